from benchmarks.plan import Plan


def adopt(plan: Plan) -> None: ...
