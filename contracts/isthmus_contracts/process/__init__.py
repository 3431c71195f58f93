"""Helpers for long-running processes: asyncio tasks, HTTP servers, log limits and open files."""
