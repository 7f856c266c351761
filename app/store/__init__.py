"""The SQL: the only package that imports SQLAlchemy or asyncpg. Where a row lives is the job's state."""
