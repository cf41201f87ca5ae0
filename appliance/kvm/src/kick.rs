// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Getting a thread out of a system call that it may never come back from.
//!
//! Only a signal makes KVM_RUN return while the guest halts for ever. A real-time signal
//! that nobody uses gets a handler that does nothing, once for the process.

use libc::{SIG_DFL, SIGRTMAX, SIGRTMIN, c_int};
use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;

extern "C" fn nothing(_signal: c_int) {}

/// The signal that interrupts, or `None` if every real-time signal is taken.
fn signal() -> Option<c_int> {
    static SIGNAL: OnceLock<Option<c_int>> = OnceLock::new();
    *SIGNAL.get_or_init(|| {
        // From the top: runtimes and debuggers take theirs from the bottom.
        (SIGRTMIN()..=SIGRTMAX()).rev().find(|signal| claim(*signal))
    })
}

/// Installs the handler, unless somebody else has one.
fn claim(signal: c_int) -> bool {
    // SAFETY: an all-zero sigaction is a valid value (default action, empty mask, no
    // flags, so that system calls are not restarted); both pointers are to locals or
    // null; the handler touches nothing and so is safe at any moment.
    unsafe {
        let mut current: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &raw mut current) != 0
            || current.sa_sigaction != SIG_DFL
        {
            return false;
        }
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = nothing as extern "C" fn(c_int) as libc::sighandler_t;
        libc::sigaction(signal, &raw const ours, std::ptr::null_mut()) == 0
    }
}

/// Lets the calling thread be interrupted, whatever mask it has inherited.
pub fn accept_kicks() {
    if let Some(signal) = signal() {
        // SAFETY: the set is a local that sigemptyset initialises before it is used, and
        // only this thread's mask changes.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
    }
}

/// Interrupts the system call that `thread` is in, if any.
///
/// A kick that comes just before the call is lost: repeat it until the thread has ended.
pub fn kick<T>(thread: &JoinHandle<T>) {
    if let Some(signal) = signal() {
        // SAFETY: the handle is borrowed, so the thread is neither joined nor detached
        // and its identifier is valid; the signal has our handler.
        unsafe {
            libc::pthread_kill(thread.as_pthread_t(), signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_kick_ends_a_blocking_call() {
        let thread = std::thread::spawn(|| {
            accept_kicks();
            let hour = libc::timespec { tv_sec: 3600, tv_nsec: 0 };
            // SAFETY: the request is a local and no remainder is asked for.
            unsafe { libc::nanosleep(&raw const hour, std::ptr::null_mut()) }
        });
        let started = Instant::now();
        while !thread.is_finished() {
            kick(&thread);
            std::thread::sleep(Duration::from_millis(1));
            assert!(started.elapsed() < Duration::from_secs(10), "the thread sleeps on");
        }
        assert_eq!(thread.join().unwrap(), -1);
    }
}
