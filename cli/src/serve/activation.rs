// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets that systemd, or whoever speaks its protocol (`sd_listen_fds(3)`), has opened.

use super::background;
use crate::failure::Failure;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The number of the first socket.
const FIRST: RawFd = 3;

/// More sockets than this are a mistake.
const MOST: RawFd = 64;

/// The sockets that are meant for this process. Can be called once.
pub(super) fn take() -> Result<Vec<OwnedFd>, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let numbers = numbers(
        variable("LISTEN_PID").as_deref(),
        variable("LISTEN_FDS").as_deref(),
        background::meant(),
    )?;
    let mut taken = Vec::new();
    for number in numbers {
        // SAFETY: it is used in the next call alone, for which nothing has to be open.
        let claimed = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(claimed, rustix::io::FdFlags::CLOEXEC).map_err(|error| {
            Failure::usage(format!("descriptor {number}, which LISTEN_FDS names, is not open"))
                .because(&std::io::Error::from(error))
        })?;
        // SAFETY: it is open, whoever set these variables has left it to this process, and
        // nothing else here knows its number: they are taken once, before anything that
        // could have got one of these numbers is opened.
        taken.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(taken)
}

/// Numbers of the descriptors, if they are meant for process `own`.
fn numbers(
    process: Option<&str>,
    count: Option<&str>,
    own: u32,
) -> Result<std::ops::Range<RawFd>, Failure> {
    let is_own = process.and_then(|text| text.parse().ok()) == Some(own);
    let Some(count) = count.filter(|_| is_own) else { return Ok(FIRST..FIRST) };
    match count.parse::<RawFd>() {
        Ok(count) if (0..=MOST).contains(&count) => Ok(FIRST..FIRST + count),
        _ => Err(Failure::usage(format!("LISTEN_FDS is '{count}', expected 0 to {MOST}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_for_this_process_is_taken() {
        let of = |process, count| numbers(process, count, 7).map_err(|f| f.message().to_owned());
        assert_eq!(of(None, None), Ok(3..3));
        assert_eq!(of(Some("7"), Some("2")), Ok(3..5));
        assert_eq!(of(Some("8"), Some("2")), Ok(3..3));
        assert_eq!(of(Some("7"), None), Ok(3..3));
        assert_eq!(of(Some("x"), Some("x")), Ok(3..3));
        assert!(of(Some("7"), Some("65")).is_err() && of(Some("7"), Some("-1")).is_err());
    }
}
