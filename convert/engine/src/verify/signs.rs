// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signs of life and of death in what a guest prints.

/// Bytes of one line that are looked at; the beginning of a longer one is forgotten.
const LONGEST_LINE: usize = 4096;

/// What a boot test has been waiting for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// The guest is up, and this shows it.
    Life(String),
    /// It will not come up any more, and this shows it.
    Death(String),
}

/// What ends a boot, and what it means.
const DEATHS: [(&str, &str); 10] = [
    ("Kernel panic - not syncing", "the kernel panicked"),
    ("Gave up waiting for root", "the initramfs did not find the root filesystem"),
    ("(initramfs) ", "the initramfs stopped at its prompt"),
    ("No bootable device", "the firmware found nothing to boot from"),
    ("No bootable option or device was found", "the firmware found nothing to boot from"),
    ("Shell> ", "the UEFI firmware found nothing to boot from and started its shell"),
    ("grub rescue> ", "GRUB did not find its own files"),
    ("You are in emergency mode", "the guest is in emergency mode"),
    ("Welcome to emergency mode", "the guest is in emergency mode"),
    ("Entering emergency mode", "the initramfs is in emergency mode"),
];

/// Which signs of life count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A login prompt.
    Login,
    /// This text on one line.
    Text(String),
    /// None: only deaths are looked for.
    Nothing,
}

/// Looks for signs in console output as it comes, in pieces of any size.
#[derive(Debug)]
pub(crate) struct Watcher {
    wanted: Wanted,
    line: Vec<u8>,
    escapes: Escapes,
}

/// Where in a terminal's escape sequence the last byte was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escapes {
    #[default]
    Outside,
    Begun,
    /// Ends with a letter.
    Control,
    /// A title or the like; ends with BEL or the next escape.
    Text,
}

impl Escapes {
    /// Takes the next byte; whether it is none of a sequence.
    fn pass(&mut self, byte: u8) -> bool {
        let (next, passes) = match (*self, byte) {
            (_, 0x1b) => (Self::Begun, false),
            (Self::Begun, b'[') => (Self::Control, false),
            (Self::Begun, b']') => (Self::Text, false),
            (Self::Begun, _) | (Self::Control, 0x40..=0x7e) | (Self::Text, 0x07) => {
                (Self::Outside, false)
            }
            (state, _) => (state, state == Self::Outside),
        };
        *self = next;
        passes
    }
}

/// `output` as text without escape sequences and without control characters but line ends.
pub(crate) fn plain(output: &[u8]) -> String {
    let mut escapes = Escapes::default();
    let bytes: Vec<u8> = output.iter().copied().filter(|byte| escapes.pass(*byte)).collect();
    let text = String::from_utf8_lossy(&bytes);
    text.chars().filter(|letter| !letter.is_control() || *letter == '\n').collect()
}

impl Watcher {
    pub(crate) fn new(wanted: Wanted) -> Self {
        Self { wanted, line: Vec::new(), escapes: Escapes::default() }
    }

    /// Takes the next bytes; the first sign in them.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Option<Sign> {
        bytes.iter().find_map(|byte| self.take_byte(*byte))
    }

    fn take_byte(&mut self, byte: u8) -> Option<Sign> {
        if !self.escapes.pass(byte) {
            return None;
        }
        match byte {
            b'\n' => self.line.clear(),
            // A carriage return belongs to the line's end; other controls to nothing.
            0..=0x1f | 0x7f => {}
            _ => {
                if self.line.len() == LONGEST_LINE {
                    self.line.drain(..LONGEST_LINE / 2);
                }
                self.line.push(byte);
                return self.sign_at_end();
            }
        }
        None
    }

    /// The sign that the last byte completed.
    fn sign_at_end(&self) -> Option<Sign> {
        let ends_with = |text: &str| self.line.ends_with(text.as_bytes());
        match &self.wanted {
            Wanted::Text(expected) if ends_with(expected) => {
                return Some(Sign::Life(format!("{expected:?} appeared on the serial console")));
            }
            Wanted::Login if ends_with("login: ") && !ends_with("Last login: ") => {
                let prompt = String::from_utf8_lossy(&self.line);
                let prompt = prompt.trim();
                return Some(Sign::Life(format!("login prompt on the serial console: {prompt:?}")));
            }
            _ => {}
        }
        let (text, meaning) = DEATHS.iter().find(|(text, _)| ends_with(text))?;
        Some(Sign::Death(format!("{meaning} ({:?} on the console)", text.trim())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(expected: Option<&str>, text: &str) -> Option<Sign> {
        let wanted = expected.map_or(Wanted::Login, |text| Wanted::Text(text.into()));
        let whole = Watcher::new(wanted.clone()).take(text.as_bytes());
        let mut piecewise = Watcher::new(wanted);
        let found = text.as_bytes().iter().find_map(|byte| piecewise.take(&[*byte]));
        assert_eq!(whole, found, "{text:?}");
        whole
    }

    #[test]
    fn login_prompts_are_signs_of_life() {
        for text in [
            "Debian GNU/Linux 12 fixture ttyS0\r\n\r\nfixture login: ",
            "\x1b[2J\x1b[1mhost login: \x1b[0m[    9.1] late message\n",
            "\x1b]0;title login\x07\nhost login: ",
        ] {
            let Some(Sign::Life(sign)) = first(None, text) else { panic!("{text:?}") };
            assert!(sign.contains("login:"), "{sign}");
        }
        for text in ["Last login: today", "login:", "login is possible\n", "log\nin: ", ""] {
            assert_eq!(first(None, text), None, "{text:?}");
        }
    }

    #[test]
    fn an_expected_text_is_the_only_sign_of_life() {
        assert_eq!(first(Some("GUEST-DONE"), "host login: "), None);
        assert_eq!(first(Some("GUEST-DONE"), "GUEST-\nDONE"), None);
        assert_eq!(Watcher::new(Wanted::Nothing).take(b"host login: "), None);
        let sign = first(Some("GUEST-DONE"), "host login: \r\nGUEST-DO\x1b[0mNE\r\n");
        assert!(matches!(sign, Some(Sign::Life(_))), "{sign:?}");
        // It wins over a death of the same words.
        let sign = first(Some("Kernel panic - not syncing"), "Kernel panic - not syncing");
        assert!(matches!(sign, Some(Sign::Life(_))), "{sign:?}");
    }

    #[test]
    fn deaths_are_recognised() {
        for text in [
            "[    3.1] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n",
            "Gave up waiting for root file system device.  Common problems:",
            "BusyBox v1.35.0\r\n(initramfs) ",
            "No bootable device.  Retrying in 60 seconds.",
            "BdsDxe: No bootable option or device was found.",
            "\x1b[10;01H\x1b[1m\x1b[33m\x1b[40mShell> \x1b[0m",
            "error: unknown filesystem.\r\nEntering rescue mode...\r\ngrub rescue> ",
            "You are in emergency mode. After logging in",
            "\x1b[0;1;31mEntering emergency mode. Exit the shell to continue.",
        ] {
            assert!(matches!(first(None, text), Some(Sign::Death(_))), "{text:?}");
            assert!(matches!(first(Some("x!"), text), Some(Sign::Death(_))), "{text:?}");
            let sign = Watcher::new(Wanted::Nothing).take(text.as_bytes());
            assert!(matches!(sign, Some(Sign::Death(_))), "{text:?}");
        }
    }

    #[test]
    fn text_is_left_when_escapes_are_gone() {
        let output = b"\x1b[0;1;31mred\x1b[0m\r\n\x1b]0;title\x1b\\b\xc3\xbc\xff\x1bM\x07\x1b[";
        assert_eq!(plain(output), "red\nb\u{fc}\u{fffd}");
    }

    #[test]
    fn endless_lines_are_bounded_and_still_looked_at() {
        let mut watcher = Watcher::new(Wanted::Login);
        for _ in 0..10 * LONGEST_LINE {
            assert_eq!(watcher.take(b"x"), None);
            assert!(watcher.line.len() <= LONGEST_LINE);
        }
        assert!(watcher.take(b" login: ").is_some());
    }
}
