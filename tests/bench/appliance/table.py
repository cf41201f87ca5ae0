#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Prints what run.sh measured as Markdown tables.

Usage: table.py FOLDER

The folder has tcg.tsv, nested.tsv and instructions.tsv, or some of them.
"""

import os
import re
import statistics
import subprocess
import sys


def read(folder: str, name: str) -> list[list[str]]:
    """Lines of tab-separated values; none if the part was never measured."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as lines:
            return [line.rstrip("\n").split("\t") for line in lines]
    except FileNotFoundError:
        return []


def table(head: list[str], rows: list[list[str]]) -> None:
    """One table, the first column to the left and the others to the right."""
    print("\n| " + " | ".join(head) + " |")
    print("|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def machine() -> None:
    """What it was measured on."""
    with open("/proc/cpuinfo", encoding="utf-8") as text:
        found = re.search(r"^model name\s*: (.*)$", text.read(), re.MULTILINE)
    command = ["qemu-system-x86_64", "--version"]
    qemu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[3]
    load = os.getloadavg()[0]
    model = found.group(1) if found else "unknown"
    print(f"{os.cpu_count()} × {model}; QEMU {qemu}; load {load:.1f}.")


def starts(values: dict[str, list[float]], names: dict[str, str], peer_of: dict[str, str]) -> None:
    """Least and median of each, and how many times that its peer takes."""
    rows = []
    for key, name in names.items():
        if key not in values:
            continue
        least, middle = min(values[key]), statistics.median(values[key])
        peer = values.get(peer_of.get(key, ""))
        times = f"{statistics.median(peer) / middle:.2f}×" if peer else ""
        rows.append([name, f"{least:.0f} ms", f"{middle:.0f} ms", times])
    table(["", "least", "median", "the peer takes"], rows)


def by_emulation(lines: list[list[str]]) -> None:
    """Starts on this machine."""
    values: dict[str, list[float]] = {}
    for kind, which, milliseconds in lines:
        values.setdefault(f"{kind} {which}", []).append(float(milliseconds))
    runs = len(values["process guestfish"])
    print(f"\nBy emulation, with one disk; {runs} runs in turns. The peer is guestfish.")
    names = {
        "process guestfish": "`guestfish -a DISK run`, the whole process",
        "process cold": "`tranship shell -a DISK run`, the whole process, cold",
        "process warm": "the same, warm",
        "ready cold": "`tranship appliance bench`, until the disk is there, cold",
        "ready warm": "the same, warm",
    }
    starts(values, names, dict.fromkeys(list(names)[1:], "process guestfish"))


def with_kvm(lines: list[list[str]]) -> None:
    """Starts, memory and exits in the nested machine."""
    values: dict[str, list[float]] = {}
    for _, side, kind, milliseconds in (line for line in lines if line[0] == "start"):
        values.setdefault(f"{side} {kind}", []).append(float(milliseconds))
    print(
        "\nWith KVM in a machine that is emulated itself: from the start of the machine's process to\n"
        "the agent's word, or from its start with a saved machine to the first answer with the disk\n"
        "in place. `microvm` and `q35` are QEMU with nothing of ours around it; the peer is\n"
        "`microvm`, and for what the user waits for our backend with QEMU."
    )
    names, peers = {}, {}
    for kind in ("cold", "warm"):
        for side, name in (
            ("kvm", "our monitor"),
            ("microvm", "QEMU, `microvm`"),
            ("q35", "QEMU, `q35`"),
            ("qemu-kvm", "`--backend qemu-kvm`"),
        ):
            names[f"{side} {kind}"] = f"{name}, {kind}"
        peers[f"kvm {kind}"] = f"microvm {kind}"
        peers[f"kvm {kind}, in all"] = f"qemu-kvm {kind}, in all"
    for kind in ("cold, in all", "warm, in all"):
        names[f"kvm {kind}"] = f"`tranship appliance bench`, {kind}"
        names[f"qemu-kvm {kind}"] = f"the same with `--backend qemu-kvm`, {kind}"
    starts(values, names, peers)

    memory = {(side, int(disks), what): int(kibibytes)
              for _, side, disks, what, kibibytes in (line for line in lines if line[0] == "memory")}
    if memory:
        print(
            "\nMemory of the machine's process beside the guest's, in KiB. Private is what nobody else\n"
            "has; the rest are pages of files, Pss has its share of them."
        )
        rows = []
        for side, disks in dict.fromkeys((side, disks) for side, disks, _ in memory):
            def of(what: str, key: tuple[str, int] = (side, disks)) -> int:
                return memory[(*key, what)]
            private = of("Private_Clean") + of("Private_Dirty")
            shown = (of("Private_Dirty"), private, of("Pss"), of("Rss"))
            rows.append([f"{side}, {disks} disk{'s' * (disks > 1)}", *map(str, shown)])
        table(["", "private and written", "private", "Pss", "Rss"], rows)

    counted = {(side, size, what): int(value)
               for _, side, size, what, value in (line for line in lines if line[0] == "requests")}
    boots = {(side, what): int(value)
             for _, side, what, value in (line for line in lines if line[0] == "boot")}
    if boots:
        print("\nA boot until the agent has run two commands, by the same counters.")
        rows = []
        for side in dict.fromkeys(side for side, _ in boots):
            exits = boots[(side, "exits")] - boots[(side, "irq_exits")]
            whats = ("insn_emulation", "io_exits", "mmio_exits", "halt_exits")
            rows.append([side, str(exits), *(str(boots[(side, what)]) for what in whats)])
        table(["", "exits", "emulated instructions", "ports", "device registers", "halts"], rows)

    print(
        "\nFor each request of direct reads, by KVM's counters and the kernel's. Exits are those of\n"
        "the guest's doing: interrupts for the machine around it come with time, not with requests."
    )
    rows = []
    for side, size in dict.fromkeys((side, size) for side, size, _ in counted):
        def each(what: str, key: tuple[str, str] = (side, size)) -> float:
            return counted[(*key, what)] / counted[(*key, "requests")]
        exits = counted[(side, size, "exits")] - counted[(side, size, "irq_exits")]
        figures = (
            exits / counted[(side, size, "mebibytes")],
            each("exits") - each("irq_exits"),
            each("insn_emulation"),
            each("halt_exits"),
            each("irq_injections"),
            each("waits"),
        )
        time = (each("user ms") + each("system ms")) * 1000
        rows.append([f"{side}, {size}", str(counted[(side, size, "requests")]),
                     *(f"{figure:.2f}" for figure in figures), f"{time:.0f} µs"])
    table(["", "requests", "exits per MiB", "exits", "emulated instructions", "halts", "interrupts",
           "waits of threads", "CPU outside the guest"], rows)


def main() -> int:
    folder = sys.argv[1]
    machine()
    if lines := read(folder, "tcg.tsv"):
        by_emulation(lines)
    if lines := read(folder, "nested.tsv"):
        with_kvm(lines)
    if lines := read(folder, "instructions.tsv"):
        print(
            f"\nOur device spends {lines[0][2]} instructions in user space on a read of 4 KiB that comes\n"
            "alone, from its doorbell until its thread waits again (callgrind, from a file, without a\n"
            "guest). QEMU's cannot be counted here: there are no performance counters in either machine."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
