from benchmarks.plan import Plan


def upgrade(plan: Plan) -> None: ...
