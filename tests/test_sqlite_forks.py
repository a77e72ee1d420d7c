"""Processes that fork with the embedded store open: nothing is shared, held up or lost."""

from pathlib import Path

import pytest
from conftest import finished, healthy, script

from tako_runtime.store import Home, base, open_store


def test_a_forked_child_opens_its_own_store_and_both_may_write(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import os, sys
            from tako_runtime import store, signal_sync
            signal_sync("before")
            mine = store.current()
            child = os.fork()
            for n in range(50):
                signal_sync("child" if child == 0 else "parent")
            print("own" if (store.current() is not mine) == (child == 0) else "shared", flush=True)
            if child == 0:
                store.current().close()
                mine.close()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            signal_sync("after")
            mine.close()
            sys.exit(os.waitstatus_to_exitcode(status))
            """,
            home=home,
        )
    )
    assert told.split() == ["own", "own"]
    opened = open_store(home)
    names = [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))]
    opened.close()
    assert {name: names.count(name) for name in names} == {"before": 1, "child": 50, "parent": 50, "after": 1}
    assert healthy(path)


def test_a_child_that_is_forked_while_others_write_is_not_held_up_by_their_locks(home: Home) -> None:
    finished(
        script(
            """
            import os, threading
            from tako_runtime import signal_sync
            signal_sync("open")
            stop = threading.Event()
            def write():
                while not stop.is_set():
                    signal_sync("parent")
            writers = [threading.Thread(target=write) for _ in range(4)]
            for each in writers: each.start()
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    signal_sync("child")
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            stop.set()
            for each in writers: each.join()
            """,
            home=home,
        )
    )
    opened = open_store(home)
    names = [kept.name for kept in opened.do_sync(base.KeptSignals(now=0, limit=1_000_000))]
    opened.close()
    assert names.count("child") == 10


def test_a_process_that_dies_while_it_writes_does_not_leave_its_lock_to_forked_children(home: Home) -> None:
    """As under a preloading server: the parent is killed, its children, who never used the store, live on."""
    process = script(
        """
        import os, threading
        from tako_runtime import signal_sync
        signal_sync("open")
        def write():
            for n in range(60):
                signal_sync("parent")
            os.kill(os.getpid(), 9)
        writers = [threading.Thread(target=write) for _ in range(8)]
        for each in writers: each.start()
        child = os.fork()
        if child == 0:
            os.read(0, 1)
            os._exit(0)
        for each in writers: each.join()
        """,
        home=home,
    )
    process.wait(timeout=60)
    try:
        told = finished(script("from tako_runtime import signal_sync; print(signal_sync('free'))", home=home), 20)
    finally:
        process.communicate("\n")
    assert told == "0\n"


def test_a_child_that_outlives_the_process_it_was_forked_from_loses_nothing(home: Home, path: Path) -> None:
    """As when a server goes into the background after it has used the store."""
    child = script(
        """
        import os, sys
        from tako_runtime import signal_sync
        signal_sync("parent")
        if os.fork():
            os._exit(0)
        signal_sync("child, early")
        print("ready", flush=True)
        sys.stdin.readline()
        signal_sync("child, late")
        print("stored", flush=True)
        os.kill(os.getpid(), 9)
        """,
        home=home,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.wait(timeout=20)
    another = "from tako_runtime import signal_sync, store; signal_sync('another'); store.current().close()"
    finished(script(another, home=home))
    assert child.communicate("\n")[0] == "stored\n"
    opened = open_store(home)
    names = {kept.name for kept in opened.do_sync(base.KeptSignals(now=0))}
    opened.close()
    assert names == {"parent", "child, early", "another", "child, late"}
    assert healthy(path)


@pytest.mark.parametrize("when", ["idle", "opening", "writing"])
def test_a_forked_child_carries_none_of_the_stores_files(home: Home, when: str) -> None:
    told = finished(
        script(
            """
            import os, sys, threading
            from tako_runtime import signal_sync, store
            from tako_runtime.store.sqlite import SqliteStore, in_bulk
            reached, forked = threading.Event(), threading.Event()
            def pausing(real):
                def paused(self, *given):
                    answer = real(self, *given)
                    reached.set()
                    forked.wait(1)  # no longer, since the fork may wait for us
                    return answer
                return paused
            def held():
                files = {os.path.realpath(path): path.stat() for path in store.locate().app_dir.glob("runs.db*")}
                for number in range(3, 256):
                    try:
                        there = os.fstat(number)
                    except OSError:
                        continue
                    yield from (name for name, stat in files.items() if os.path.samestat(stat, there))
            if sys.argv[1] == "opening":
                SqliteStore._migrate = pausing(SqliteStore._migrate)
            else:
                signal_sync("before")
                SqliteStore._run = pausing(SqliteStore._run)
            thread = threading.Thread(target=signal_sync, args=("now",))
            thread.start()
            reached.wait()
            if sys.argv[1] == "idle":
                forked.set()
                thread.join()
            child = os.fork()
            if child == 0:
                print(*held(), flush=True)
                os._exit(0)
            forked.set()
            os.waitpid(child, 0)
            thread.join()
            """,
            when,
            home=home,
        )
    )
    assert told == "\n"


def test_a_forked_child_may_fork_again(home: Home) -> None:
    """As under a preloading server whose workers start processes of their own."""
    finished(
        script(
            """
            import os
            from tako_runtime import signal_sync
            def in_a_child(do):
                child = os.fork()
                if child == 0:
                    do()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            def further():
                in_a_child(lambda: signal_sync("grandchild"))
                signal_sync("child")
                in_a_child(lambda: signal_sync("grandchild"))
            signal_sync("parent")
            in_a_child(further)
            signal_sync("parent")
            """,
            home=home,
        ),
        30,
    )
    opened = open_store(home)
    names = sorted(kept.name for kept in opened.do_sync(base.KeptSignals(now=0)))
    opened.close()
    assert names == ["child", "grandchild", "grandchild", "parent", "parent"]


def test_threads_that_fork_at_the_same_time_do_not_stop_the_store(home: Home) -> None:
    finished(
        script(
            """
            import os, sys, threading
            from tako_runtime import signal_sync
            sys.setswitchinterval(1e-5)
            signal_sync("open")
            def forks():
                for _ in range(50):
                    child = os.fork()
                    if child == 0:
                        os._exit(0)
                    os.waitpid(child, 0)
            forking = [threading.Thread(target=forks) for _ in range(4)]
            for each in forking: each.start()
            for _ in range(50):
                signal_sync("written")
            for each in forking: each.join()
            """,
            home=home,
        ),
        30,
    )
    opened = open_store(home)
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 51
    opened.close()
