"""The tables of version 0.1."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
        sa.UniqueConstraint("name", name="studies_name"),
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("study", sa.Integer, sa.ForeignKey("studies.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("entries", sa.JSON, nullable=False),
        sa.Column("outcome", sa.JSON, nullable=False),
        sa.Column("reward", sa.Double),
        sa.Column("source", sa.String(40), nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.UniqueConstraint("study", "number", name="trials_study_number"),
    )
    op.create_table(
        "measurements",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("study", sa.Integer, sa.ForeignKey("studies.id"), primary_key=True, autoincrement=False),
        sa.Column("trials", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("tensors", sa.LargeBinary, nullable=False),
    )
    op.create_table("grainwise_schema", sa.Column("version", sa.Integer, primary_key=True))
