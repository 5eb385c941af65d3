"""Networks of one task in one."""
