// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which system calls are allowed, and with which arguments.

use crate::{Error, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What every thread of the runtime needs to live, to wait and to die.
const RUNTIME: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the threads of disks and streams do with what is open.
const INPUT_OUTPUT: &[libc::c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_mincore,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendfile,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_splice,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
];

/// What a library may try and can do without: it fails instead of ending the process.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_stat,
    libc::SYS_lstat,
];

/// ioctls: the machine's own, those of block devices that zero and discard, and the one by
/// which the runtime sets up sockets.
const IOCTLS: &[u64] = &[
    KVM_CREATE_VCPU,
    KVM_RUN,
    KVM_SIGNAL_MSI,
    KVM_IRQ_LINE,
    KVM_IOEVENTFD,
    KVM_IRQFD,
    KVM_KVMCLOCK_CTRL,
    KVM_GET_CLOCK,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_MSRS,
    KVM_GET_FPU,
    KVM_GET_LAPIC,
    KVM_GET_MP_STATE,
    KVM_GET_VCPU_EVENTS,
    KVM_GET_DEBUGREGS,
    KVM_GET_XSAVE,
    KVM_GET_XSAVE2,
    KVM_GET_TSC_KHZ,
    KVM_GET_XCRS,
    KVM_GET_IRQCHIP,
    KVM_GET_PIT2,
    BLKDISCARD,
    BLKZEROOUT,
    BLKSSZGET,
    FIONBIO,
];

// <linux/kvm.h>
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_RUN: u64 = 0xae80;
const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;
const KVM_IRQ_LINE: u64 = 0x4008_ae61;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_FPU: u64 = 0x81a0_ae8c;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XSAVE2: u64 = 0x9000_aecf;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_PIT2: u64 = 0x8070_ae9f;
// <linux/fs.h>, <asm-generic/ioctls.h>
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKSSZGET: u64 = 0x1268;
const FIONBIO: u64 = 0x5421;

/// What threads set of themselves: their names, and what can only take more away.
const PRCTLS: &[u64] = &[PR_SET_NAME, PR_SET_NO_NEW_PRIVS];
const PR_SET_NAME: u64 = 15;
const PR_SET_NO_NEW_PRIVS: u64 = 38;

fn filter_error(error: impl std::fmt::Display) -> Error {
    Error::Config(format!("the filter of system calls: {error}"))
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition> {
    SeccompCondition::new(argument, length, operator, value).map_err(filter_error)
}

/// One rule for each value that an argument may have.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>> {
    let rule = |value: &u64| {
        let equal = condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![equal]).map_err(filter_error)
    };
    values.iter().map(rule).collect()
}

/// Memory that is mapped or changed must not become code.
fn not_executable(protection: u8) -> Result<Vec<SeccompRule>> {
    let mask = u64::try_from(libc::PROT_EXEC).unwrap_or(4);
    let clear = condition(protection, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), 0)?;
    Ok(vec![SeccompRule::new(vec![clear]).map_err(filter_error)?])
}

fn runtime() -> Result<Rules> {
    let mut rules: Rules = RUNTIME.iter().map(|number| (*number, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, not_executable(2)?);
    rules.insert(libc::SYS_mprotect, not_executable(2)?);
    rules.insert(libc::SYS_prctl, one_of(0, PRCTLS)?);
    rules.insert(
        libc::SYS_fcntl,
        one_of(
            1,
            &[libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_DUPFD_CLOEXEC]
                .map(|command| u64::try_from(command).unwrap_or(0)),
        )?,
    );
    Ok(rules)
}

fn compiled(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram> {
    let architecture: TargetArch = std::env::consts::ARCH.try_into().map_err(filter_error)?;
    SeccompFilter::new(rules, otherwise, matched, architecture)
        .and_then(TryInto::try_into)
        .map_err(filter_error)
}

fn errno(number: i32) -> SeccompAction {
    SeccompAction::Errno(u32::try_from(number).unwrap_or(1))
}

/// For all threads, to be applied in this order: what is not listed ends the process.
pub(super) fn process() -> Result<[BpfProgram; 3]> {
    let mut rules = runtime()?;
    rules.extend(INPUT_OUTPUT.iter().map(|number| (*number, Vec::new())));
    rules.insert(libc::SYS_ioctl, one_of(1, IOCTLS)?);
    // The NBD client sets the time-outs and buffers of its socket.
    let socket_level = u64::try_from(libc::SOL_SOCKET).unwrap_or(1);
    rules.insert(libc::SYS_setsockopt, one_of(1, &[socket_level])?);
    // Threads, but no processes.
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap_or(0);
    let masked = condition(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![masked]).map_err(filter_error)?]);
    // A processor's thread adds its own filter.
    rules.insert(libc::SYS_seccomp, Vec::new());
    // Passed on by this filter, and refused by the next two. The runtime falls back to clone,
    // whose flags can be looked at, only if clone3 seems not to exist.
    let not_there = [libc::SYS_clone3];
    for number in REFUSED.iter().chain(&not_there) {
        rules.insert(*number, Vec::new());
    }
    let plain = |numbers: &[libc::c_long]| -> Rules {
        numbers.iter().map(|number| (*number, Vec::new())).collect()
    };
    Ok([
        compiled(plain(&not_there), SeccompAction::Allow, errno(libc::ENOSYS))?,
        compiled(plain(REFUSED), SeccompAction::Allow, errno(libc::EPERM))?,
        compiled(rules, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ])
}

/// For a processor's thread: besides running the guest it raises interrupts and prints.
pub(super) fn processor() -> Result<BpfProgram> {
    let mut rules = runtime()?;
    let ioctls = [KVM_RUN, KVM_SIGNAL_MSI, KVM_IRQ_LINE, KVM_IOEVENTFD, KVM_KVMCLOCK_CTRL];
    rules.insert(libc::SYS_ioctl, one_of(1, &ioctls)?);
    compiled(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}
