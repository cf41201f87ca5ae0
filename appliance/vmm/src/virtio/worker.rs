// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thread that works on a queue until it is told to stop.

use super::{ActiveQueue, Link};
use crate::memory::Ram;
use crate::virtio::chain::{self, Broken, Chain};
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A descriptor that becomes readable.
pub(crate) fn event() -> Result<Arc<EventFd>> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(Error::system("an event descriptor"))
}

/// The descriptor of an event.
pub(crate) fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event that is borrowed here.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A thread with the queue that it works on.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    thread: JoinHandle<T>,
    stop: Arc<EventFd>,
}

type Task = Box<dyn FnOnce() + Send>;

/// Starts threads on behalf of a processor's thread.
///
/// The driver's write that starts a device reaches us on a processor's thread, whose filter
/// of system calls a thread that it started would inherit.
#[derive(Clone, Debug)]
pub(crate) struct Spawner(Sender<Task>);

impl Spawner {
    pub(crate) fn new() -> Result<Self> {
        let (sender, tasks) = channel::<Task>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || tasks.into_iter().for_each(|task| task()))
            .map_err(Error::system("a thread that starts others"))?;
        Ok(Self(sender))
    }

    /// Starts `work`, which ends soon after its event becomes readable.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        name: String,
        work: impl FnOnce(&EventFd) -> T + Send + 'static,
    ) -> Result<Worker<T>> {
        let (sender, started) = channel();
        let task = Box::new(move || drop(sender.send(Worker::start(name, work))));
        let gone = || Error::Config("the thread that starts others is gone".into());
        self.0.send(task).map_err(|_| gone())?;
        started.recv().map_err(|_| gone())?
    }
}

impl<T: Send + 'static> Worker<T> {
    fn start(name: String, work: impl FnOnce(&EventFd) -> T + Send + 'static) -> Result<Self> {
        let stop = event()?;
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name(name)
                .spawn(move || work(&stop))
                .map_err(Error::system("a thread for a queue"))?
        };
        Ok(Self { thread, stop })
    }

    /// Ends the thread; what it returns, unless it panicked.
    pub(crate) fn end(self) -> Option<T> {
        // A counter that is full is readable, too.
        let _ = self.stop.write(1);
        let ended = self.thread.join();
        // Tests are to see a panic.
        #[cfg(test)]
        let ended = Ok::<_, ()>(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.ok()
    }
}

/// Waits until one of `others` is ready or `stop` is: which of them are, `None` if it is time
/// to stop.
pub(crate) fn wait(stop: &EventFd, others: &[PollFd<'_>]) -> Option<Vec<bool>> {
    let stop = descriptor(stop);
    let mut all = vec![PollFd::new(&stop, PollFlags::IN)];
    all.extend_from_slice(others);
    loop {
        match poll(&mut all, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return None,
        }
    }
    let mut ready = all.iter().map(|polled| !polled.revents().is_empty());
    if ready.next()? { None } else { Some(ready.collect()) }
}

/// What a device does with a request: how many bytes it wrote into the buffers.
pub(crate) trait Serve {
    fn serve(&mut self, chain: Chain, ram: &Ram) -> std::result::Result<u32, Broken>;
}

/// Requests that are served before somebody looks whether it is time to stop: a driver can ask
/// for more on one processor while it waits for a reset on another.
pub(crate) const MOST_AT_ONCE: usize = 1024;

/// Serves everything that is available now, and then some. After [`MOST_AT_ONCE`] requests the
/// queue is kicked instead.
pub(crate) fn drain(
    active: &mut ActiveQueue,
    ram: &Ram,
    link: &Link,
    server: &mut dyn Serve,
) -> std::result::Result<(), Broken> {
    let queue = &mut active.queue;
    let mut left = MOST_AT_ONCE;
    loop {
        queue.disable_notification(ram).map_err(|_| Broken("used ring"))?;
        while let Some(chain) = chain::next(queue, ram)? {
            let head = chain.head;
            let written = server.serve(chain, ram)?;
            queue.add_used(ram, head, written).map_err(|_| Broken("used ring"))?;
            if queue.needs_notification(ram).map_err(|_| Broken("available ring"))? {
                link.queue_used(active.index);
            }
            left = left.saturating_sub(1);
            if left == 0 {
                let _ = active.kick.write(1);
                return Ok(());
            }
        }
        if !queue.enable_notification(ram).map_err(|_| Broken("used ring"))? {
            return Ok(());
        }
    }
}

/// Works on one queue until `stop`, and gives it back.
// What a request costs is counted by this name, and it is called once for each thread.
#[inline(never)]
pub(crate) fn follow(
    mut active: ActiveQueue,
    ram: &Ram,
    link: &Link,
    server: &mut dyn Serve,
    stop: &EventFd,
) -> ActiveQueue {
    loop {
        if !link.is_broken()
            && let Err(Broken(why)) = drain(&mut active, ram, link, server)
        {
            link.break_down(why);
        }
        let kick = Arc::clone(&active.kick);
        let kick_fd = descriptor(&kick);
        if wait(stop, &[PollFd::new(&kick_fd, PollFlags::IN)]).is_none() {
            return active;
        }
        let _ = kick.read();
    }
}
