from benchmarks.plan import Plan


def reports(plan: Plan) -> None: ...
