// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual machine around the micro-guest, from opening the device to the last step.

use crate::failure::Failure;
use crate::guest;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Nanoseconds that a turn of the loop may take, the way out of the guest shared among
/// the turns. Hardware needs about 1, nested virtualization under an emulated processor
/// below 100 even when busy, software ring 0 above 2000.
const SLOWEST_TURN: f64 = 200.0;

/// Capabilities without which the appliance's guest cannot be built.
const CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::UserMemory, "guest memory from user space"),
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::Irqfd, "interrupts from event descriptors"),
    (Cap::Ioeventfd, "event descriptors for device writes"),
    (Cap::ExtCpuid, "processor identification for guests"),
    (Cap::SetTssAddr, "task state segment"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// Called with the name of each step that is done and the time that it took.
pub(crate) type Report<'a> = &'a mut dyn FnMut(&'static str, Duration);

/// Builds a guest on `device` and runs it. Gives the nanoseconds of one turn of the loop.
pub(crate) fn run(device: &Path, stop: &AtomicBool, report: Report<'_>) -> Result<f64, Failure> {
    let mut clock = Clock { last: Instant::now(), report };
    // First, so that it is dropped last.
    let mut memory = guest::memory();
    let kvm = open(device)?;
    clock.done("open");
    let vm = kvm.create_vm().map_err(setup("creating a virtual machine"))?;
    clock.done("virtual machine");
    vm.set_tss_address(0xfffb_d000).map_err(setup("placing the task state segment"))?;
    vm.create_irq_chip().map_err(setup("creating the interrupt controllers"))?;
    clock.done("interrupt controllers");
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: memory.as_mut_ptr().expose_provenance() as u64,
    };
    // SAFETY: the region is exactly the vector's pages, which are page-aligned, are not
    // touched from here on, and outlive `vm` and `vcpu`, which are declared after them.
    unsafe { vm.set_user_memory_region(region) }.map_err(setup("mapping guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(setup("creating a processor"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(setup("asking for processor features"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("setting processor features"))?;
    let registers = vcpu.get_sregs().map_err(setup("reading registers"))?;
    vcpu.set_sregs(&long_mode(&registers)).map_err(setup("entering long mode"))?;
    let registers =
        kvm_regs { rip: guest::start(), rsp: guest::STACK, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&registers).map_err(setup("setting registers"))?;
    clock.done("processor");
    follow(&mut vcpu, stop, &mut clock)
}

struct Clock<'a> {
    last: Instant,
    report: Report<'a>,
}

impl Clock<'_> {
    fn done(&mut self, step: &'static str) -> Duration {
        let now = Instant::now();
        let took = now.duration_since(self.last);
        self.last = now;
        (self.report)(step, took);
        took
    }
}

fn setup(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Failure {
    move |error| Failure::Setup { what, error: error.into() }
}

fn open(device: &Path) -> Result<Kvm, Failure> {
    let path =
        CString::new(device.as_os_str().as_bytes()).map_err(|error| Failure::Open(error.into()))?;
    let kvm = Kvm::new_with_path(path).map_err(|error| {
        let error = io::Error::from(error);
        match error.kind() {
            io::ErrorKind::NotFound => Failure::NoDevice,
            io::ErrorKind::PermissionDenied => Failure::NoPermission,
            // The node is there, the driver behind it is not.
            _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
                Failure::NoDevice
            }
            _ => Failure::Open(error),
        }
    })?;
    match kvm.get_api_version() {
        12 => {}
        other => return Err(Failure::Version(other)),
    }
    match CAPABILITIES.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(Failure::Capability(name)),
        None => Ok(kvm),
    }
}

/// A flat segment of ring 0, for 64-bit code or for data.
pub fn flat_segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}

/// 64-bit ring 0 with paging, as a boot loader would leave it.
fn long_mode(reset: &kvm_sregs) -> kvm_sregs {
    let data = flat_segment(16, 3, false);
    let task = kvm_segment {
        base: guest::TSS,
        limit: 0x67,
        selector: 24,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    let idt_limit = u16::try_from(guest::VECTORS * 16 - 1).unwrap_or(u16::MAX);
    kvm_sregs {
        cs: flat_segment(8, 11, true),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        gdt: kvm_dtable { base: guest::GDT, limit: 23, ..kvm_dtable::default() },
        idt: kvm_dtable { base: guest::IDT, limit: idt_limit, ..kvm_dtable::default() },
        cr0: 0x8005_0033, // PG AM WP NE ET MP PE
        cr3: guest::PML4,
        cr4: 0x620,  // PAE OSFXSR OSXMMEXCPT
        efer: 0xd00, // LME LMA NXE
        ..*reset
    }
}

/// Runs the guest and listens to its reports.
fn follow(vcpu: &mut VcpuFd, stop: &AtomicBool, clock: &mut Clock<'_>) -> Result<f64, Failure> {
    let mut after = "start";
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < guest::TIMED_RUNS {
        if stop.load(Ordering::Relaxed) {
            // The watcher knows the limit and says so itself.
            return Err(Failure::TimedOut { after, limit: Duration::ZERO });
        }
        let how = match vcpu.run() {
            Ok(VcpuExit::IoOut(guest::PORT, &[number])) => {
                let index = usize::from(number).checked_sub(1);
                if let Some(name) = index.and_then(|index| guest::STEPS.get(index)) {
                    after = name;
                    let took = clock.done(name);
                    if number == guest::TIMED_STEP {
                        let per_turn = took.as_secs_f64() * 1e9 / f64::from(guest::TURNS);
                        // One quick run is enough: a busy host only makes runs longer.
                        if per_turn <= SLOWEST_TURN {
                            return Ok(per_turn);
                        }
                        best = best.min(per_turn);
                        runs += 1;
                    }
                    continue;
                }
                match number {
                    guest::UNEXPECTED => "unexpected exception".to_owned(),
                    guest::WRONG_RESULT => "wrong result".to_owned(),
                    _ => format!("report {number:#x}"),
                }
            }
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::InternalError) => "KVM could not emulate an instruction".to_owned(),
            Ok(VcpuExit::FailEntry(reason, _)) => format!("entry failed with {reason:#x}"),
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => format!("KVM_RUN said \"{error}\""),
        };
        return Err(Failure::Emulation { after, how });
    }
    Err(Failure::Slow(best))
}
