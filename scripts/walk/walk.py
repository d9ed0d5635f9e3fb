"""Goes the way that the README's rehearsal shows, in an empty directory: each command of its `console` blocks is run, and what
it prints has to be what stands below it. An ellipsis stands for any text on its line, a line that is only an ellipsis for
any lines."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECTION = "### A rehearsal, without an account"
# Written by the shell after each command's output.
END = "--- end of a command ---"
SECONDS = 120


def steps(text):
    """Files to write and commands with what they print, in the order of the section."""
    section = text.split(f"{SECTION}\n", 1)[1]
    section = re.split(r"^##+ ", section, maxsplit=1, flags=re.M)[0]
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.M | re.S):
        if language == "toml":
            name = re.match(r"# (\S+)\n", body).group(1)
            yield "file", name, body
        elif language == "console":
            command, printed = None, []
            for line in body.splitlines():
                if line.startswith("$ "):
                    if command:
                        yield "command", command, printed
                    command, printed = line[2:], []
                elif line.startswith("> "):
                    command += "\n" + line[2:]
                else:
                    printed.append(line)
            if command:
                yield "command", command, printed


def fits(shown, printed):
    """Whether `printed` is what `shown` says."""
    pattern = ""
    for line in shown:
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("…"))) + r" *\n"
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in printed)) is not None


def main():
    binary = Path(sys.argv[1]).resolve().parent
    readme = Path(__file__).resolve().parents[2] / "README.md"
    with tempfile.TemporaryDirectory() as directory:
        environment = {"PATH": f"{binary}:{os.environ['PATH']}", "HOME": directory, "LANG": "C.UTF-8"}
        shell = subprocess.Popen(["bash"], cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, start_new_session=True)
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
        signal.alarm(SECONDS)
        count = 0
        try:
            for kind, what, content in steps(readme.read_text(encoding="utf-8")):
                if kind == "file":
                    Path(directory, what).parent.mkdir(parents=True, exist_ok=True)
                    Path(directory, what).write_text(content, encoding="utf-8")
                    continue
                shell.stdin.write(f"{what}\necho '{END}'\n")
                shell.stdin.flush()
                printed = []
                for line in shell.stdout:
                    if line.rstrip("\n").endswith(END):
                        if rest := line.rstrip("\n")[: -len(END)]:
                            printed.append(rest)
                        break
                    printed.append(line.rstrip("\n"))
                if not fits(content, printed):
                    sys.exit("walk: `" + what + "` prints\n" + "\n".join(printed) + "\n\nthe README shows\n" + "\n".join(content))
                count += 1
        except TimeoutError:
            sys.exit(f"walk: `{what}` did not end within {SECONDS} s")
        finally:
            signal.alarm(0)
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait()
    if count < 8:
        sys.exit(f"walk: only {count} commands were found below {SECTION!r}")
    print(f"walk: {count} commands print what the README shows")


main()
