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
# The oldest schema whose releases can still read and write a cache after this migration.
oldest = ${repr(up_revision)}

# Not written by Alembic: the CHECK constraints of a column that is added; and views over what changes have to be dropped
# before it and made again after it. And a batch copies the table and words its
# definition anew, which `cachedb db check` reports: op.add_column and op.drop_column do neither, as in 0003.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
