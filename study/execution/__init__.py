"""Run trials and keep their record: engine, session, and what the user sees."""
