// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads that run the guest's instructions.

use crate::board::{Board, Ending, count};
use crate::{Error, Result, confine};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tranship_kvm::kick;

/// All processors, before and while they run.
#[derive(Debug)]
pub(crate) struct Processors {
    waiting: Vec<VcpuFd>,
    threads: Vec<JoinHandle<VcpuFd>>,
    /// Whether the threads run under a filter of system calls.
    confined: bool,
    /// The threads are to end, and the guest is to stand still between two instructions.
    pausing: Arc<AtomicBool>,
}

impl Processors {
    pub(crate) fn new(vcpus: Vec<VcpuFd>) -> Self {
        Self {
            waiting: vcpus,
            threads: Vec::new(),
            confined: false,
            pausing: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Starts a thread for each.
    pub(crate) fn start(&mut self, board: &Arc<Board>, confined: bool) -> Result<()> {
        self.confined = confined;
        for (number, vcpu) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            let (board, pausing) = (Arc::clone(board), Arc::clone(&self.pausing));
            let thread = std::thread::Builder::new()
                .name(format!("processor {number}"))
                .spawn(move || run(vcpu, &board, confined, &pausing))
                .map_err(Error::system("a thread for a processor"))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Makes all processors stand still; `false` if none was running.
    pub(crate) fn pause(&mut self) -> bool {
        let running = !self.threads.is_empty();
        self.pausing.store(true, Ordering::Release);
        self.end();
        self.pausing.store(false, Ordering::Release);
        running
    }

    /// Lets them go on after a pause.
    pub(crate) fn resume(&mut self, board: &Arc<Board>) -> Result<()> {
        self.start(board, self.confined)
    }

    /// The processors that stand still, by number.
    pub(crate) fn standing(&self) -> &[VcpuFd] {
        &self.waiting
    }

    /// Waits until every thread has noticed that the machine has ended, or is to pause.
    pub(crate) fn end(&mut self) {
        for thread in self.threads.drain(..) {
            // A kick that comes just before the guest is entered is lost.
            while !thread.is_finished() {
                kick::kick(&thread);
                std::thread::sleep(Duration::from_micros(200));
            }
            if let Ok(vcpu) = thread.join() {
                self.waiting.push(vcpu);
            }
        }
    }
}

fn run(mut vcpu: VcpuFd, board: &Board, confined: bool, pausing: &AtomicBool) -> VcpuFd {
    kick::accept_kicks();
    if confined && let Err(error) = confine::allow_only_what_a_processor_needs() {
        board.end(Ending::Failed(error.to_string()));
    }
    while !board.has_ended() {
        // What an instruction asked of us has reached the guest only when the processor is
        // entered once more: a pause begins with the entry that does this and nothing else.
        let pause = pausing.load(Ordering::Acquire);
        vcpu.set_kvm_immediate_exit(u8::from(pause));
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => board.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => board.write_port(port, data),
            Ok(VcpuExit::MmioRead(at, data)) => board.read_memory(at, data),
            Ok(VcpuExit::MmioWrite(at, data)) => board.write_memory(at, data),
            Ok(VcpuExit::Shutdown) => board.end(Ending::TripleFault),
            Ok(VcpuExit::InternalError) => {
                board.end(Ending::Failed("an instruction could not be emulated".into()));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                board.end(Ending::Failed(format!("the guest was not entered ({reason:#x})")));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                count(&board.exits.other);
            }
            Ok(other) => board.end(Ending::Failed(format!("unexpected exit {other:?}"))),
            Err(error) if pause && error.errno() == libc::EINTR => break,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => board.end(Ending::Failed(error.to_string())),
        }
    }
    vcpu.set_kvm_immediate_exit(0);
    vcpu
}
