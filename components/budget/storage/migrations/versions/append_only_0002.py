"""The database refuses to change or remove an entry."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_REFUSAL = "the ledger is append-only"


def upgrade() -> None:
    """Triggers against UPDATE and DELETE: they stop mistakes; the chain of digests shows malice."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER lazydp_no_{verb.lower()} BEFORE {verb} ON lazydp_entries "
                f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION lazydp_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER lazydp_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON lazydp_entries "
        "FOR EACH STATEMENT EXECUTE FUNCTION lazydp_refuse()"
    )
