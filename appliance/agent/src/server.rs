// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Takes calls from the host and answers them, any number at once.

use crate::failure::{Result, io, plain, system};
use crate::programs::{self, Running, shell_status};
use crate::{files, mounts, plugging, present, volumes};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tranship_protocol::{
    Body, CHUNK, Call, Credit, Frame, FrameKind, GuestPath, Hello, ProgramOutput, Progress, Reply,
    WINDOW,
};

/// Largest key of an encrypted volume, in bytes; cryptsetup has the same limit.
const MOST_KEY: usize = 8 << 20;

/// Time that a program gets to end after it has closed its output.
const EXIT_GRACE: Duration = Duration::from_secs(30);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One end of a port that several threads write to.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn send(&self, frame: &Frame) -> Result<()> {
        frame.write_to(&mut *lock(&self.0)).map_err(|error| plain(error.to_string()))
    }

    fn send_body<B: Body>(&self, id: u64, body: &B) -> Result<()> {
        let frame = Frame::encode(id, body).map_err(|error| plain(error.to_string()))?;
        self.send(&frame)
    }
}

/// What one call shares with the threads that read the ports.
struct Request {
    cancelled: AtomicBool,
    /// Bytes that may still be sent to the host, and a signal that there are more.
    credit: Mutex<u64>,
    more_credit: Condvar,
    /// Where uploaded bytes go; `None` marks their end.
    upload: Mutex<Sender<Option<Vec<u8>>>>,
}

type Requests = Arc<Mutex<HashMap<u64, Arc<Request>>>>;

/// Serves until the host hangs up or asks for the end.
pub(crate) fn serve(control: File, bulk: File, hello: &Hello) -> Result<()> {
    let failed = |error: std::io::Error| io("virtio-serial port", &error);
    let control_in = control.try_clone().map_err(failed)?;
    let bulk_in = bulk.try_clone().map_err(failed)?;
    let control = Port(Arc::new(Mutex::new(control)));
    let bulk = Port(Arc::new(Mutex::new(bulk)));
    let requests: Requests = Arc::default();

    let on_bulk = Arc::clone(&requests);
    std::thread::Builder::new()
        .name("bulk".into())
        .spawn(move || take_uploads(bulk_in, &on_bulk))
        .map_err(failed)?;
    control.send_body(0, hello)?;
    take_calls(control_in, &control, &bulk, &requests)
}

fn take_uploads(mut bulk: File, requests: &Requests) {
    while let Ok(Some(frame)) = Frame::read_from(&mut bulk) {
        let Some(request) = lock(requests).get(&frame.id).cloned() else { continue };
        let message = match frame.kind {
            FrameKind::Data => Some(frame.body),
            FrameKind::End => None,
            _ => continue,
        };
        // The call may have failed and dropped the other end; the host will learn.
        let _ = lock(&request.upload).send(message);
    }
}

fn take_calls(mut stream: File, control: &Port, bulk: &Port, requests: &Requests) -> Result<()> {
    loop {
        let frame = match Frame::read_from(&mut stream) {
            Ok(Some(frame)) => frame,
            // The host is gone: nothing that it wanted matters any more.
            Ok(None) => return Ok(()),
            Err(error) => return Err(plain(format!("control port: {error}"))),
        };
        match frame.kind {
            FrameKind::Call => {
                let call: Call = frame.decode().map_err(|error| plain(error.to_string()))?;
                start_call(frame.id, call, control, bulk, requests)?;
            }
            FrameKind::Credit => {
                let Credit(bytes) = frame.decode().map_err(|error| plain(error.to_string()))?;
                if let Some(request) = lock(requests).get(&frame.id) {
                    let mut credit = lock(&request.credit);
                    *credit = credit.saturating_add(bytes);
                    request.more_credit.notify_all();
                }
            }
            FrameKind::Cancel => {
                if let Some(request) = lock(requests).get(&frame.id) {
                    request.cancelled.store(true, Ordering::SeqCst);
                    request.more_credit.notify_all();
                    let _ = lock(&request.upload).send(None);
                }
            }
            _ => return Err(plain("the host sent a message that only an agent sends")),
        }
    }
}

fn start_call(id: u64, call: Call, control: &Port, bulk: &Port, requests: &Requests) -> Result<()> {
    let (sender, receiver) = channel();
    let request = Arc::new(Request {
        cancelled: AtomicBool::new(false),
        credit: Mutex::new(WINDOW),
        more_credit: Condvar::new(),
        upload: Mutex::new(sender),
    });
    lock(requests).insert(id, Arc::clone(&request));
    let worker = Worker {
        id,
        control: control.clone(),
        bulk: bulk.clone(),
        request,
        receiver: Mutex::new(receiver),
    };
    let requests = Arc::clone(requests);
    std::thread::Builder::new()
        .name(format!("call {id}"))
        .spawn(move || {
            let downloads = call.downloads();
            let ends = matches!(call, Call::Shutdown);
            let outcome = worker.run(call);
            if downloads {
                let end = Frame { kind: FrameKind::End, id, body: Vec::new() };
                let _ = worker.bulk.send(&end);
            }
            lock(&requests).remove(&id);
            let _ = match outcome {
                Ok(reply) => worker.control.send_body(id, &reply),
                Err(failure) => worker.control.send_body(id, &failure),
            };
            if ends {
                crate::boot::power_off();
            }
        })
        .map(|_| ())
        .map_err(|error| io("starting a thread", &error))
}

/// Carries out one call.
struct Worker {
    id: u64,
    control: Port,
    bulk: Port,
    request: Arc<Request>,
    receiver: Mutex<Receiver<Option<Vec<u8>>>>,
}

impl Worker {
    fn run(&self, call: Call) -> Result<Reply> {
        match call {
            Call::Ping => Ok(Reply::Done),
            Call::Shutdown => {
                mounts::unmount_all()?;
                rustix::fs::sync();
                Ok(Reply::Done)
            }
            Call::Prepare => present::prepare().map(|()| Reply::Done),
            Call::Wake { seconds, nanoseconds, entropy } => {
                present::wake(seconds, nanoseconds, &entropy.0).map(|()| Reply::Done)
            }
            Call::Plugged { serials } => plugging::wait_for(&serials).map(|()| Reply::Done),
            Call::Unplug { serial } => plugging::let_go(&serial).map(|()| Reply::Done),
            Call::Disks => volumes::disks().map(Reply::Volumes),
            Call::Volumes => volumes::volumes().map(Reply::Volumes),
            Call::OpenEncrypted { device, name } => {
                let key = self.uploaded(MOST_KEY)?;
                volumes::open_encrypted(&device, &name, &key).map(|()| Reply::Done)
            }
            Call::Mount { device, mountpoint, options, fstype } => {
                mounts::mount_guest(&device, &mountpoint, &options, fstype.as_deref())
                    .map(|()| Reply::Done)
            }
            Call::Unmount { mountpoint } => {
                mounts::unmount_guest(&mountpoint).map(|()| Reply::Done)
            }
            Call::UnmountAll => mounts::unmount_all().map(|()| Reply::Done),
            Call::Mounts => Ok(Reply::Mounts(mounts::list())),
            Call::Sync => mounts::sync().map(|()| Reply::Done),
            Call::Check { device, fstype } => mounts::check(&device, &fstype).map(Reply::Checked),
            Call::Trim { mountpoint } => mounts::trim(&mountpoint).map(Reply::Bytes),
            Call::Lstat { path } => files::attributes(&path, false).map(Reply::Attributes),
            Call::Stat { path } => files::attributes(&path, true).map(Reply::Attributes),
            Call::ReadLink { path } => files::read_link(&path).map(Reply::Target),
            Call::ReadDir { path } => self.read_dir(&path),
            Call::Space { path } => files::space(&path).map(Reply::Space),
            Call::Download { path } => self.download(&path),
            Call::Upload { path, new, parents } => {
                let mut file = files::replace(&path, new, parents)?;
                self.each_upload(|bytes| file.write(bytes))?;
                file.finish().map(|()| Reply::Done)
            }
            Call::Append { path, align, backup } => {
                let mut file = files::append(&path, align, backup.as_ref())?;
                self.each_upload(|bytes| file.write(bytes))?;
                file.finish().map(Reply::Bytes)
            }
            Call::MakeDir { path, mode } => files::make_dirs(&path, mode).map(|()| Reply::Done),
            Call::Symlink { path, target } => files::symlink(&path, &target).map(|()| Reply::Done),
            Call::Copy { from, to } => files::copy(&from, &to).map(|()| Reply::Done),
            Call::Remove { path } => files::remove(&path).map(|()| Reply::Done),
            Call::Run { arguments, in_guest, input, timeout } => {
                self.run_program(&arguments, in_guest, input, timeout)
            }
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.request.cancelled.load(Ordering::SeqCst) {
            return Err(system("the call was cancelled", Errno::INTR));
        }
        Ok(())
    }

    /// Sends bytes to the host, waiting for credit.
    fn send_data(&self, bytes: Vec<u8>) -> Result<()> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut credit = lock(&self.request.credit);
        while *credit < size {
            self.check_cancelled()?;
            let waited = self.request.more_credit.wait_timeout(credit, Duration::from_millis(200));
            credit = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.check_cancelled()?;
        *credit -= size;
        drop(credit);
        self.bulk.send(&Frame { kind: FrameKind::Data, id: self.id, body: bytes })
    }

    /// Passes everything that the host uploads to `take`.
    fn each_upload(&self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.control.send_body(self.id, &Credit(WINDOW))?;
        let receiver = lock(&self.receiver);
        while let Ok(Some(bytes)) = receiver.recv() {
            self.check_cancelled()?;
            take(&bytes)?;
            let taken = u64::try_from(bytes.len()).unwrap_or(0);
            self.control.send_body(self.id, &Credit(taken))?;
        }
        self.check_cancelled()
    }

    /// Everything that the host uploads, at most `limit` bytes.
    fn uploaded(&self, limit: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        self.each_upload(|bytes| {
            all.extend_from_slice(bytes);
            if all.len() > limit { Err(plain(format!("more than {limit} bytes"))) } else { Ok(()) }
        })?;
        Ok(all)
    }

    fn read_dir(&self, path: &GuestPath) -> Result<Reply> {
        // Names have at most 255 bytes, so 512 of them stay well below a frame's limit.
        for names in files::read_dir(path)?.chunks(512) {
            let frame = Frame::encode(self.id, &names.to_vec())
                .map_err(|error| plain(error.to_string()))?;
            self.send_data(frame.body)?;
        }
        Ok(Reply::Done)
    }

    fn download(&self, path: &GuestPath) -> Result<Reply> {
        let mut file = files::open_regular(path)?;
        let total = file.metadata().map_err(|error| io(path, &error))?.len();
        let mut done = 0;
        let mut told = Instant::now();
        loop {
            let mut buffer = vec![0; CHUNK];
            let count = files::read_some(&mut file, &mut buffer, path)?;
            if count == 0 {
                return Ok(Reply::Bytes(done));
            }
            buffer.truncate(count);
            self.send_data(buffer)?;
            done += u64::try_from(count).unwrap_or(0);
            if told.elapsed() > Duration::from_millis(200) {
                told = Instant::now();
                self.control.send_body(self.id, &Progress { done, total })?;
            }
        }
    }

    fn run_program(
        &self,
        arguments: &[String],
        in_guest: bool,
        input: bool,
        timeout: u32,
    ) -> Result<Reply> {
        if in_guest {
            programs::check_guest_is_mounted()?;
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut running = programs::start(&arguments, in_guest, input)?;
        let outcome = std::thread::scope(|scope| {
            let stdin = running.child.stdin.take();
            if let Some(mut stdin) = stdin {
                scope.spawn(move || {
                    let _ = self.each_upload(|bytes| {
                        stdin.write_all(bytes).map_err(|error| io("standard input", &error))
                    });
                });
            }
            let outcome = self.follow(&mut running, timeout);
            if outcome.is_ok() {
                // A program that has closed its output may still be on its way out.
                running.wait_for_end(EXIT_GRACE);
            }
            running.kill_all();
            // Ends the thread above if the host has not closed the input.
            let _ = lock(&self.request.upload).send(None);
            outcome
        });
        let status = running.child.wait().map_err(|error| io(running.name(), &error))?;
        outcome?;
        Ok(Reply::Finished(ProgramOutput { status: shell_status(status) }))
    }

    /// Sends what the program prints until it ends, is cancelled or takes too long.
    fn follow(&self, running: &mut Running, timeout: u32) -> Result<()> {
        let deadline =
            (timeout > 0).then(|| Instant::now() + Duration::from_secs(u64::from(timeout)));
        let mut ended = false;
        loop {
            let mut ready =
                [rustix::event::PollFd::new(&running.output, rustix::event::PollFlags::IN)];
            let wait =
                rustix::event::Timespec { tv_sec: 0, tv_nsec: if ended { 0 } else { 50_000_000 } };
            let count = rustix::event::poll(&mut ready, Some(&wait))
                .map_err(|error| system(running.name(), error))?;
            if count > 0 {
                let mut buffer = vec![0; CHUNK];
                let name = running.name().to_owned();
                let count = running.output.read(&mut buffer).map_err(|error| io(&name, &error))?;
                if count == 0 {
                    return Ok(());
                }
                buffer.truncate(count);
                self.send_data(buffer)?;
                continue;
            }
            if ended {
                // The program is gone and the pipe is empty: what still holds it open is a
                // process that the program left behind.
                return Ok(());
            }
            self.check_cancelled()?;
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(system(running.name(), Errno::TIMEDOUT));
            }
            ended = matches!(running.child.try_wait(), Ok(Some(_)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_protocol::Failure;

    #[test]
    fn failures_carry_the_errno() {
        let failure: Failure = system("/x", Errno::NOENT);
        assert_eq!((failure.errno, failure.message.as_str()), (2, "/x: No such file or directory"));
    }
}
