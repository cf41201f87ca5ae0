// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds out why a machine is gone that nobody asked to go, and keeps its memory.

use crate::backend::Machine;
use crate::dumps;
use crate::session::{Cause, Ground, Loss};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

/// How the line begins by which Linux says why it panicked.
const PANIC: &str = "Kernel panic - not syncing: ";
/// The most letters of it that are told.
const MOST_LETTERS: usize = 200;
/// Lines of the console that are told.
const LAST_LINES: usize = 20;
/// Time for a machine to end, and for its last words to arrive, after it has hung up.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The machine below a session, as long as it is there.
#[derive(Debug)]
pub(crate) struct Postmortem {
    pub(crate) machine: Weak<dyn Machine>,
    /// Where the kernel's notes for debuggers are.
    pub(crate) vmcoreinfo: Option<(u64, u64)>,
    /// Where memory is kept; `None` to keep none.
    pub(crate) dumps: Option<PathBuf>,
}

impl Ground for Postmortem {
    fn ended(&self) -> Option<String> {
        self.machine.upgrade()?.ended()
    }

    fn explain(&self, cause: &Cause) -> Loss {
        let Some(machine) = self.machine.upgrade() else { return Loss::new(cause.words()) };
        if let Cause::Closed(_) | Cause::Ended(_) = cause {
            // A machine that hangs up is about to end, and says why on its console.
            machine.wait(LAST_WORDS);
        }
        let (ended, console) = (machine.ended(), machine.console());
        let panic = panic(&console);
        let message = match (&panic, &ended) {
            (Some(panic), _) => format!("the appliance's kernel panicked: {panic}"),
            (None, Some(how)) => format!("the appliance ended by itself: {how}"),
            (None, None) => cause.words().to_owned(),
        };
        tracing::debug!(?cause, ?ended, ?panic, "the appliance stopped, and nobody asked it to");
        let hung = matches!(cause, Cause::Hung(_));
        let mut loss = Loss::new(message);
        loss.because = last_lines(&console);
        if panic.is_some() || ended.is_some() || hung {
            self.dump(&*machine, &mut loss);
        }
        loss.remedy.get_or_insert_with(|| {
            "run it again with --trace to see what the appliance did last".to_owned()
        });
        loss
    }
}

impl Postmortem {
    fn dump(&self, machine: &dyn Machine, loss: &mut Loss) {
        let Some(folder) = self.dumps.as_deref() else { return };
        match dumps::keep(folder, |file| machine.dump(file, self.vmcoreinfo)) {
            Ok((path, size)) => {
                tracing::debug!(path = %path.display(), size, "memory dumped");
                loss.message += "; its memory is in ";
                loss.message += &path.display().to_string();
                loss.remedy = Some(remedy(&path));
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::debug!(%error, cause, "memory not dumped");
            }
        }
    }
}

fn remedy(path: &Path) -> String {
    format!(
        "open it with `crash vmlinux {}`, or run it again with --trace; the file holds what the \
         appliance knew of the guest (TRANSHIP_DUMPS=off keeps none)",
        path.display()
    )
}

/// Why the kernel says that it panicked.
fn panic(console: &str) -> Option<String> {
    let said = console.lines().find_map(|line| line.split_once(PANIC))?.1;
    Some(said.chars().take(MOST_LETTERS).collect())
}

/// How a console ended, `None` if it never began. What comes before a panic says more than the
/// registers behind it.
pub(crate) fn last_lines(console: &str) -> Option<String> {
    let lines: Vec<&str> = console.lines().collect();
    let panic = lines.iter().position(|line| line.contains(PANIC));
    let end = panic.map_or(lines.len(), |at| at.saturating_add(LAST_LINES / 2).min(lines.len()));
    let last = lines.get(end.saturating_sub(LAST_LINES)..end).filter(|lines| !lines.is_empty())?;
    Some(format!("its console ended with:\n{}", last.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{SnapshotFiles, SpecDisk};
    use crate::session::{CancelToken, Patience, Session};
    use crate::{Error, ErrorKind, Result};
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tranship_protocol::{Call, Hello};

    /// A machine that panics when it is told to, and has four bytes of memory.
    #[derive(Debug, Default)]
    struct Fake {
        panicked: Arc<AtomicBool>,
        undumpable: bool,
    }

    impl Machine for Fake {
        fn ended(&self) -> Option<String> {
            self.panicked.load(Ordering::SeqCst).then(|| "the guest reset itself".to_owned())
        }

        fn wait(&self, _: Duration) -> bool {
            self.panicked.load(Ordering::SeqCst)
        }

        fn kill(&self) {}

        fn console(&self) -> String {
            if self.panicked.load(Ordering::SeqCst) {
                format!("[    1.5] {PANIC}sysrq triggered crash\n[    1.6] Rebooting\n")
            } else {
                String::new()
            }
        }

        fn add_disk(&self, _: &SpecDisk) -> Result<()> {
            Ok(())
        }

        fn remove_disk(&self, _: &str) -> Result<()> {
            Ok(())
        }

        fn save(&self, _: &SnapshotFiles) -> Result<()> {
            Ok(())
        }

        fn dump(&self, mut to: &File, vmcoreinfo: Option<(u64, u64)>) -> Result<()> {
            if self.undumpable {
                return Err(Error::new(ErrorKind::Launch, "it cannot"));
            }
            assert_eq!(vmcoreinfo, Some((1, 2)));
            to.write_all(b"core").map_err(|error| Error::new(ErrorKind::Io, "dump").because(error))
        }
    }

    /// A session over a machine; the far ends of its streams stay open.
    fn watched(fake: Fake, dumps: Option<&Path>) -> (Session, Arc<dyn Machine>, [UnixStream; 2]) {
        let ((control, far_control), (bulk, far_bulk)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let hello = Hello {
            version: 0,
            kernel: "6.1".into(),
            stages: Vec::new(),
            vmcoreinfo: Some((1, 2)),
        };
        let session = Session::resume(control, bulk, CancelToken::default(), hello).unwrap();
        let machine: Arc<dyn Machine> = Arc::new(fake);
        let postmortem = Postmortem {
            machine: Arc::downgrade(&machine),
            vmcoreinfo: Some((1, 2)),
            dumps: dumps.map(Path::to_owned),
        };
        let patience =
            Patience { quiet: Duration::from_millis(40), answer: Duration::from_millis(40) };
        session.watch(patience, Arc::new(postmortem)).unwrap();
        (session, machine, [far_control, far_bulk])
    }

    #[test]
    fn a_panic_is_named_and_its_memory_kept() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("dumps");
        let fake = Fake { panicked: Arc::new(true.into()), ..Fake::default() };
        let (session, _machine, _streams) = watched(fake, Some(&folder));
        let error = session.call(&Call::Sync).unwrap_err();
        let files: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(files.len(), 1);
        assert_eq!(
            error.to_string(),
            format!(
                "sync: the appliance's kernel panicked: sysrq triggered crash; its memory is in {}",
                files[0].display()
            )
        );
        assert_eq!(error.kind(), ErrorKind::Lost);
        assert!(std::error::Error::source(&error).unwrap().to_string().ends_with("Rebooting"));
        assert_eq!(std::fs::read(&files[0]).unwrap(), b"core");
        // It is told again, and not dumped again.
        assert_eq!(session.call(&Call::Ping).unwrap_err().to_string()[4..], error.to_string()[4..]);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn a_machine_that_hangs_up_is_looked_at_once_it_is_gone() {
        let fake = Fake { panicked: Arc::new(true.into()), ..Fake::default() };
        let (session, _machine, streams) = watched(fake, None);
        drop(streams);
        let error = session.call(&Call::Sync).unwrap_err().to_string();
        assert_eq!(error, "sync: the appliance's kernel panicked: sysrq triggered crash");
    }

    #[test]
    fn a_machine_that_cannot_be_dumped_is_explained_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("dumps");
        let fake = Fake { undumpable: true, ..Fake::default() };
        let (session, _machine, _streams) = watched(fake, Some(&folder));
        let error = session.call(&Call::Sync).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("sync: the appliance has hung: not a word for "), "{text}");
        assert!(text.contains("(waiting: sync for "), "{text}");
        assert!(error.remedy().unwrap().contains("--trace"));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn an_end_that_was_asked_for_is_not_explained() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("dumps");
        let fake = Fake::default();
        let panicked = Arc::clone(&fake.panicked);
        let (session, _machine, streams) = watched(fake, Some(&folder));
        let agent = std::thread::spawn(move || {
            let mut control = &streams[0];
            tranship_protocol::Frame::read_from(&mut control).unwrap();
            panicked.store(true, Ordering::SeqCst);
        });
        let error = session.call(&Call::Shutdown).unwrap_err().to_string();
        agent.join().unwrap();
        assert!(!error.contains("panicked"), "{error}");
        assert!(!folder.exists());
    }

    #[test]
    fn only_the_panics_own_words_are_told() {
        let long = format!("{PANIC}{}", "x".repeat(1000));
        assert_eq!(panic(&long).unwrap().len(), MOST_LETTERS);
        assert_eq!(panic("Kernel panic\n"), None);
        assert_eq!(last_lines(""), None);
        let lines: Vec<_> = (0..60).map(|line| line.to_string()).collect();
        assert!(last_lines(&lines.join("\n")).unwrap().ends_with("\n58\n59"));
        let console = format!("{}\n{PANIC}x\n{}", lines.join("\n"), lines.join("\n"));
        let last = last_lines(&console).unwrap();
        assert_eq!(last.lines().count(), 1 + LAST_LINES);
        assert!(last.contains(PANIC) && last.contains("\n59\n") && last.ends_with("\n8"), "{last}");
    }
}
