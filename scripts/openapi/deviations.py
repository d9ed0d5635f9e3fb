"""Where the relay is known to do something else than its documents say. Each is told at every run and fails none; one
that is gone fails the run, so that this list does not outlive what it lists."""

KNOWN = {}


class Checks:
    """Counts what holds; prints what does not."""

    def __init__(self):
        self.held = self.failed = 0

    def that(self, sentence, holds, detail="", known=None):
        if known and not holds:
            print(f"known    {KNOWN[known]}")
        elif known:
            self.fail(f"{KNOWN[known]}: no longer so; take it off scripts/openapi/deviations.py")
        elif holds:
            self.held += 1
        else:
            self.fail(f"{sentence}{': ' if detail else ''}{detail}")

    def fail(self, text):
        self.failed += 1
        print(f"FAILED   {text}")

    def end(self, what):
        print(f"{'FAILED  ' if self.failed else 'ok      '} {what}: {self.held} checks hold, {self.failed} fail")
        raise SystemExit(1 if self.failed else 0)
