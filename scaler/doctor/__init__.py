"""`scaler doctor`: what would stop a training on this machine, or slow it down, and how to mend it.

    for finding in examine("dinov2/vits16_in1k", ["data.shards=shards/train"]):
        print(finding.level, finding.check, finding.found, finding.fix)

Each check is a module here with `check(asked) -> findings`, and runs in a process of its own (`scaler.doctor.checks`):
a library that cannot be imported, crashes or hangs is a finding and not the doctor's end. What concerns a machine by
itself or among others (ports, names, clocks, disks) is `launch.check`'s, whose probe also runs on other hosts.
"""
