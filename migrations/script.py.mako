"""${message}

Revision: ${up_revision}
Revises: ${down_revision | comma,n}
Created: ${create_date}
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}
# The oldest revision whose releases can still read and write a cache after this migration.
oldest = ${repr(up_revision)}

# Alembic does not write the CHECK constraints of an added column. Write them.
# Drop the views over a table before you change or drop its columns, and create them again afterwards.
# Use op.add_column and op.drop_column, as in 0003. A batch copies the table and rewrites its definition, and
# `cachedb db check` reports the difference.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
