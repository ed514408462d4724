from benchmarks.plan import Plan


def registry(plan: Plan) -> None: ...
