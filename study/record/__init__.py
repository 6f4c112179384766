"""The record of all studies in one database: tables, access, queries, and frames for reports."""
