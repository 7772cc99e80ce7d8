"""The benchmark: what each strategy gains on this machine, beside what it could gain at best."""
