from __future__ import annotations
import time, subprocess, pytest
@pytest.mark.parametrize("n", range(12))
def test_x(make_rig, n):
    rig = make_rig(parts=3, tuning={"batch": 150})
    rig.begin()
    rig.letters(600)
    s = rig.worker("open:r1", "take", stop="segment:2")
    s.wait_stopped()
    import sqlite3, os
    c = sqlite3.connect(rig.folder/"ledger.db", timeout=0.5, isolation_level=None)
    try:
        c.execute("BEGIN IMMEDIATE"); c.execute("ROLLBACK")
    except Exception as e:
        print(e, os.getpid(), s.pid)
        print(open("/proc/locks").read()); print(subprocess.run(f"ls -li {rig.folder}", shell=True, capture_output=True, text=True).stdout)
        for t in os.listdir(f"/proc/{s.pid}/task"):
            print(t, open(f"/proc/{s.pid}/task/{t}/comm").read().strip(), open(f"/proc/{s.pid}/task/{t}/wchan").read(), open(f"/proc/{s.pid}/task/{t}/stat").read()[:60])
        print(s.words())
        raise
