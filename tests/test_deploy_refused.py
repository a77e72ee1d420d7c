"""`tako deploy` to a real server: releases that do not prove themselves are not taken, and nobody has met them."""

import pytest
from deploying import APP, FLOWS, PORT, WITH_APP, Hammering, Shop
from machines import Machine

pytestmark = pytest.mark.slow


# --- not taken -------------------------------------------------------------------------------------------------------

AT_IMPORT = FLOWS + '\n    if "TAKO_RELEASE" in os.environ:\n        import no_such_module\n'
AFTER_THREE_SECONDS = (
    FLOWS
    + """
    import sys, threading
    if "worker" in sys.argv:
        threading.Timer(3, lambda: (print("no licence", flush=True), os._exit(9))).start()
"""
)
NEVER_HEALTHY = """
    import http.server, os, socket, sys
    print("waits for the database", flush=True)
    class Sick(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)
        def log_message(self, *_): ...
    server = http.server.HTTPServer(("127.0.0.1", 0), Sick, bind_and_activate=False)
    server.socket = socket.socket(fileno=int(sys.argv[1]))
    server.serve_forever()
"""


@pytest.mark.parametrize(
    ("file", "text", "error", "line"),
    [
        ("workflows/flows.py", AT_IMPORT, "No module named 'no_such_module'", "ModuleNotFoundError"),
        ("workflows/flows.py", AFTER_THREE_SECONDS, "a worker of group default ended (exit code 9)", "no licence"),
        ("app.py", NEVER_HEALTHY, "the app does not answer 200 within 60 s", "waits for the database"),
    ],
    ids=["an import error", "a crash after three seconds", "an app that never gets healthy"],
)
def test_a_release_that_does_not_prove_itself_is_not_taken(
    shop: Shop, web: Machine, file: str, text: str, error: str, line: str
) -> None:
    shop.configure(WITH_APP)
    shop.write("app.py", APP)
    good = shop.release()
    before = web.run("systemctl", "show", "-p", "MainPID,NRestarts", f"tako-shop@{good}.service")
    hammer = Hammering(web, PORT, 50)
    shop.write(file, text)
    done = shop.tako("deploy", "--yes")
    told = hammer.stop()
    assert done.returncode == 1
    assert error in done.stderr
    assert line in done.stderr
    assert told["failures"] == []
    assert set(told["answers"]) == {good}, "nobody has met the bad one"
    assert web.run("systemctl", "show", "-p", "MainPID,NRestarts", f"tako-shop@{good}.service") == before
    shop.runs_on(good)
    shop.write("app.py", APP)
    shop.write("workflows/flows.py", FLOWS)
    shop.runs_on(shop.release())


@pytest.mark.lasting
def test_a_release_that_is_not_taken_leaves_the_secrets_that_were_there(shop: Shop, web: Machine) -> None:
    path = f"{shop.data_dir}/apps/shop/secrets.json"
    assert shop.tako("secrets", "set", "KEY", "--env", "production", stdin="sk_before_4711").returncode == 0
    good = shop.release()
    before = web.run("stat", "-c", "%a %U %y", path)
    assert shop.tako("secrets", "set", "KEY", "--env", "production", stdin="sk_after_0815").returncode == 0
    shop.write("workflows/flows.py", AT_IMPORT)
    assert shop.tako("deploy", "--yes").returncode == 1
    assert "sk_before_4711" in web.run("cat", path)
    assert web.run("stat", "-c", "%a %U %y", path) == before
    shop.runs_on(good)
    shop.write("workflows/flows.py", FLOWS)
    shop.runs_on(shop.release())
    assert "sk_after_0815" in web.run("cat", path)
    assert shop.tako("secrets", "rm", "KEY", "--env", "production").returncode == 0
    shop.release()
    assert web.run("cat", path) == '{"secrets":{}}', "the last one is taken away too"
    assert web.run("sh", "-c", f"ls -A {shop.data_dir}/apps/shop").count("secrets.json") == 1
