"""Helpers for long-running processes: asyncio tasks, back-off, atomic files, log limits and open files."""
