"""What Alembic runs for each command: the steps, on the connection of `migrate`."""

from alembic import context

# All steps in the transaction of that connection: a power cut leaves the old database or the new one.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
