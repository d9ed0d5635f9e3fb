"""Counts what holds; prints what does not."""


class Checks:
    """The checks of one part."""

    def __init__(self):
        self.held = self.failed = 0

    def that(self, sentence, holds, detail=""):
        if holds:
            self.held += 1
        else:
            self.fail(f"{sentence}{': ' if detail else ''}{detail}")

    def fail(self, text):
        self.failed += 1
        print(f"FAILED   {text}")

    def end(self, what):
        print(f"{'FAILED  ' if self.failed else 'ok      '} {what}: {self.held} checks hold, {self.failed} fail")
        raise SystemExit(1 if self.failed else 0)
