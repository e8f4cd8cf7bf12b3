"""The table of entries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, and let the database itself refuse a second reservation of a run."""
    op.create_table(
        "lazydp_entries",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False
        ),
        *(
            sa.Column(name, sa.Text(), nullable=False)
            for name in ("kind", "dataset", "run_id", "recorded_at", "recorded_by", "body", "previous", "digest")
        ),
    )
    reserved = sa.text("kind = 'reserved'")
    op.create_index(
        "lazydp_one_reservation",
        "lazydp_entries",
        ["run_id"],
        unique=True,
        sqlite_where=reserved,
        postgresql_where=reserved,
    )
    # Each entry follows exactly one other: two writers that missed each other's lock would collide here.
    op.create_index("lazydp_one_successor", "lazydp_entries", ["previous"], unique=True)
