// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both sides of NBD, with a peer that says what the fuzzer wants.

use super::Image;
use std::io::{Cursor, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tranship_block::{BlockDevice, Extents, Span, Zeroing};
use tranship_nbd::{ClientOptions, Export, Limits, Remote, serve};

/// What the server sends.
#[derive(Clone, Debug, Default)]
struct Sent(Arc<Mutex<u64>>);

/// Bytes that the server may send before the client hangs up.
const MOST_SENT: u64 = 8 << 20;

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut sent = self.0.lock().unwrap();
        *sent += bytes.len() as u64;
        if *sent > MOST_SENT {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A client of ours: handshake and requests. The first byte says what the disk is like.
pub(crate) fn server(input: &[u8]) {
    let (kind, stream) = input.split_first().map_or((0, input), |(kind, rest)| (*kind, rest));
    let image = Image::new(1 << 20);
    image.put(300_000, &vec![7; 70_000]);
    image.set_read_only(kind & 1 != 0);
    let export = Export {
        description: "a disk".to_owned(),
        read_only: kind & 2 != 0,
        depth: kind & 4 != 0,
        ..Export::new("vda", Arc::new(image))
    };
    // One request at a time: what follows must not depend on who is faster.
    let limits = Limits { requests: 1, status_extents: 64, ..Limits::default() };
    let _ = serve(Cursor::new(stream.to_vec()), Sent::default(), vec![export], &limits);
}

/// Rust's own start-up ignores the signal; a fuzzer starts in C++.
static PIPES_ARE_HARMLESS: LazyLock<()> = LazyLock::new(|| {
    let raised = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGPIPE, raised).expect("it can be caught");
});

/// A server that answers before it is asked.
pub(crate) fn client(input: &[u8]) {
    LazyLock::force(&PIPES_ARE_HARMLESS);
    let (kind, stream) = input.split_first().map_or((0, input), |(kind, rest)| (*kind, rest));
    let (ours, mut theirs) = UnixStream::pair().expect("there are descriptors");
    // All of it has to fit into the socket's buffer, since nobody waits on the other side.
    theirs.set_nonblocking(true).expect("a socket can be non-blocking");
    let _ = theirs.write_all(&stream[..stream.len().min(100_000)]);
    theirs.shutdown(Shutdown::Write).expect("it is connected");
    let options = ClientOptions {
        export: "vda".to_owned(),
        read_only: kind & 1 != 0,
        connections: 1,
        timeout: Duration::from_secs(5),
        ..ClientOptions::default()
    };
    let Ok(disk) = Remote::from_stream(ours, &options) else { return };
    let size = disk.size();
    let mut buf = vec![0; 20_000];
    for at in [0, size / 2] {
        let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(buf.len());
        let _ = disk.read_at(&mut buf[..len], at);
        for run in Extents::new(&disk, Span::new(at, 1 << 20)).take(100) {
            let Ok((span, _)) = run else { break };
            assert!(span.end() <= size);
        }
    }
    let _ = disk.write_at(&buf[..100], 7.min(size));
    let _ = disk.write_zeroes(Span::new(0, size.min(4096)), Zeroing::MayUnmap);
    let _ = disk.discard(Span::new(0, size.min(4096)));
    let _ = disk.flush();
}
