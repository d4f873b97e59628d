#!/usr/bin/env python3
"""Prints one table of what the guests told, a column for each kernel. The exit status is 1 if a byte was wrong, or a test failed."""
import json
import os
import sys


def read(path):
    """The lines of one guest, by kind and name; what is no JSON was cut off."""
    told = {}
    try:
        with open(path + ".json", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    one = json.loads(line)
                except ValueError:
                    continue
                told[one["kind"], one.get("name")] = one
    except OSError:
        pass
    return told


def rows_of(told, kind):
    document = told.get((kind, None))
    return document["document"]["rows"] if document else []


def per_miss(told, kind, contender):
    """mmap_lock acquisitions per miss, and a mark if bytes were wrong."""
    for row in rows_of(told, kind):
        if row["contender"] == contender:
            count = row.get("mmap_lock_per_miss_process")
            wrong = row.get("wrong_bytes", 0)
            return ("–" if count is None else f"{count:.4f}") + (f", {wrong} WRONG BYTES" if wrong else "")
    return "–"


def finding(told, what):
    doctor = told.get(("doctor", None))
    for f in doctor["document"] if doctor else []:
        if f["what"] == what:
            return "yes" if str(f["standing"]).lower() == "good" else f["found"]
    return "–"


def status(told, kind, name):
    one = told.get((kind, name))
    if one is None:
        return "FAILED: the guest told nothing of it"
    if one["status"] == 77:
        return "not possible: " + one["said"].removeprefix("faultless: ")
    return "passed" if one["status"] == 0 else "FAILED: " + one["said"]


def delayed(guests):
    """A row for each contender: reads per second alone, beside the neighbours, and the second by the first."""
    failed = False
    for release, told in guests:
        print(f"\nLinux {release}: each read takes 5 ms, 8 threads")
        if ("delay", "delay") in told:
            print("  not possible: " + told["delay", "delay"]["said"])
            failed = True
            continue
        for name in ("library-quiet", "library-churn", "programs-quiet", "programs-churn"):
            one = told.get(("delay", name))
            if one is None or one["status"] != 0:
                print(f"  {name} FAILED: {one['said'] if one else 'the guest told nothing'}")
                failed = True
        print(f"  {'':<28}{'alone, /s':>12}{'churn, /s':>12}{'ratio':>8}{'mmap_lock per miss, churn':>28}")
        for kind in ("library", "programs"):
            alone, beside = rows_of(told, kind + "-quiet"), rows_of(told, kind + "-churn")
            for row in alone:
                other = next((r for r in beside if r["contender"] == row["contender"]), None)
                if other is None:
                    continue
                wrong = row.get("wrong_bytes", 0) + other.get("wrong_bytes", 0)
                failed |= wrong > 0
                rates = row["reads_per_s"], other["reads_per_s"]
                lock = other.get("mmap_lock_per_miss_process")
                lock = "–" if lock is None else f"{lock:.4f}"
                mark = f"  {wrong} WRONG BYTES" if wrong else ""
                print(f"  {row['contender']:<28}{rates[0]:>12.0f}{rates[1]:>12.0f}{rates[1] / max(rates[0], 1e-9):>8.2f}{lock:>28}{mark}")
    return 1 if failed else 0


def main():
    mode, *paths = sys.argv[1:]
    guests = [(os.path.basename(path), read(path)) for path in paths]
    if mode == "delay":
        return delayed(guests)
    table = [("engine", lambda t: finding(t, "engine")), ("live mappings", lambda t: finding(t, "live mappings"))]
    for contender in ("mmap", "pread", "uffd-monitor", "faultless", "faultless-load"):
        name = f"mmap_lock per miss: {contender}"
        table.append((name, lambda t, c=contender: per_miss(t, "library", c)))
    for contender in ("faultless-live", "faultless-marked"):
        name = f"mmap_lock per miss: {contender}"
        table.append((name, lambda t, c=contender: per_miss(t, "live", c)))
    for contender, name in (("program", "a C program"), ("program-served", "the same, stand-in"), ("program-live", "the same, live")):
        name = f"mmap_lock per miss: {name}"
        table.append((name, lambda t, c=contender: per_miss(t, "programs", c)))
    for program in ("shape", "holes", "signals", "storm"):
        table.append((f"{program}, stand-in", lambda t, p=program: status(t, "run-stand-in", p)))
    for program in ("shape", "holes", "signals", "storm", "live", "written", "reclaimed", "handed_on"):
        table.append((f"{program}, live", lambda t, p=program: status(t, "run-live", p)))
    table.append(("observe", lambda t: status(t, "observe", "observe")))
    table.append(("observe, a wait for a mapping's own lock", lambda t: status(t, "observe", "mapping")))
    table.append(("complaints of the kernel's", lambda t: status(t, "dmesg", "dmesg")))
    failed = False
    width = max(len(name) for name, _ in table)
    for release, told in guests:
        print(f"\nLinux {release}")
        if not told:
            print("  it told nothing: see the console's output in target/kernels/out")
            failed = True
        for name, value in table:
            text = value(told)
            failed |= "FAILED" in text or "WRONG" in text
            print(f"  {name:<{width}}  {text}")
    return 1 if failed else 0


sys.exit(main())
