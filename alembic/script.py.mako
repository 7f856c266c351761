"""${message}."""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Change the schema; what runs now must still work with it (expand, deploy, contract)."""
    ${upgrades if upgrades else 'op.execute("")'}


def downgrade() -> None:
    """Change it back and keep every live job, or refuse with a sentence."""
    ${downgrades if downgrades else 'op.execute("")'}
