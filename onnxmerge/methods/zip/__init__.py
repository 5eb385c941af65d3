"""Networks of different tasks in one: what is shared, how it is fitted, and which of the candidates is chosen."""
