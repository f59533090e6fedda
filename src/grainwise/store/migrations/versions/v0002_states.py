"""Trials get states, wall-clock starts, workers and policy versions; rows that are relied on get seals."""

import hashlib

import sqlalchemy as sa
from alembic import op

from grainwise.store.seal import seal

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    bind = op.get_bind()
    if "measurements" not in sa.inspect(bind).get_table_names():  # the first databases of version 0.1
        op.create_table(
            "measurements",
            sa.Column("key", sa.String(64), primary_key=True),
            sa.Column("body", sa.JSON, nullable=False),
        )
    op.execute("DROP INDEX IF EXISTS ix_trials_study")  # the one over study and number serves as well
    for table in ("studies", "measurements", "checkpoints"):
        op.add_column(table, sa.Column("seal", sa.String(64), nullable=False, server_default=""))  # filled below
    op.add_column("trials", sa.Column("state", sa.String(10)))
    for column in (
        sa.Column("policy", sa.Integer),
        sa.Column("worker", sa.String(200)),
        sa.Column("started", sa.Double),
        sa.Column("seal", sa.String(64)),
    ):
        op.add_column("trials", column)
    _fill(bind)
    with op.batch_alter_table("trials") as batch:
        batch.alter_column("state", existing_type=sa.String(10), nullable=False)
        batch.alter_column("outcome", existing_type=sa.JSON(), nullable=True)
        batch.alter_column("seconds", existing_type=sa.Double(), nullable=True)
    # Version 0.1 would take a database without its number for a new one, and with this one it refuses in words.
    op.execute("DELETE FROM grainwise_schema")
    op.execute("INSERT INTO grainwise_schema VALUES (2)")


def _fill(bind: sa.Connection) -> None:
    """Seals of all rows; states by what the trials gave."""
    tables = sa.MetaData()
    tables.reflect(bind)
    studies, trials = tables.tables["studies"], tables.tables["trials"]
    for row in bind.execute(sa.select(studies)).all():
        sealed = seal([row.name, row.settings, row.created])
        bind.execute(studies.update().where(studies.c.id == row.id).values(seal=sealed))
    for row in bind.execute(sa.select(trials)).all():
        state = "failed" if "failed" in row.outcome else "done"
        facts = [row.study, row.number, state, row.source, None, None]
        sealed = seal([*facts, row.entries, row.outcome, row.reward, row.seconds, None])
        bind.execute(trials.update().where(trials.c.id == row.id).values(state=state, seal=sealed))
    measured, kept = tables.tables["measurements"], tables.tables["checkpoints"]
    for row in bind.execute(sa.select(measured)).all():
        bind.execute(measured.update().where(measured.c.key == row.key).values(seal=seal([row.key, row.body])))
    for row in bind.execute(sa.select(kept)).all():
        sealed = seal([row.study, row.trials, row.body, hashlib.sha256(row.tensors).hexdigest()])
        bind.execute(kept.update().where(kept.c.study == row.study).values(seal=sealed))
