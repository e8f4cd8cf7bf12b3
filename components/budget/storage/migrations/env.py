"""Alembic's entry point: migrates the connection that `storage` hands over, inside the transaction it already holds."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="lazydp_schema")
with context.begin_transaction():
    context.run_migrations()
