// SPDX-License-Identifier: Apache-2.0 OR MIT
//! guestfish's language: what one line says.

/// Arguments in one line, at most, as in guestfish.
const MOST_ARGUMENTS: usize = 63;

/// What a line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Nothing: an empty line or a comment.
    Nothing,
    /// `!text`: a command of the host's shell.
    Host(Vec<u8>),
    /// `<!text`: a command of the host's shell that prints more lines.
    Lines(Vec<u8>),
    /// A command.
    Call(Words),
}

/// A command with its arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    /// Its name as it was typed.
    pub(super) name: String,
    /// Arguments without their quotes.
    pub(super) arguments: Vec<Vec<u8>>,
    /// A command of the host's shell that reads what this one prints.
    pub(super) pipe: Option<Vec<u8>>,
}

/// What a line says, and whether its failure is forgiven.
pub(super) fn parse(line: &[u8]) -> Result<(bool, Line), String> {
    let mut forgiven = false;
    let mut rest = line.trim_ascii();
    while let [b'-', tail @ ..] = rest {
        forgiven = true;
        rest = tail.trim_ascii_start();
    }
    let line = match rest {
        [] | [b'#', ..] => Line::Nothing,
        [b'!', command @ ..] => Line::Host(command.to_vec()),
        [b'<', b'!', command @ ..] => Line::Lines(command.to_vec()),
        _ => Line::Call(words(rest)?),
    };
    Ok((forgiven, line))
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn words(line: &[u8]) -> Result<Words, String> {
    let end = line.iter().position(|byte| is_blank(*byte)).unwrap_or(line.len());
    let (name, mut rest) = line.split_at(end);
    let name = String::from_utf8_lossy(name).into_owned();
    let mut words = Words { name, ..Words::default() };
    loop {
        rest = rest.trim_ascii_start();
        match rest {
            [] => return Ok(words),
            [b'|', command @ ..] => {
                words.pipe = Some(command.to_vec());
                return Ok(words);
            }
            _ if words.arguments.len() == MOST_ARGUMENTS => {
                return Err("too many arguments".to_owned());
            }
            _ => {}
        }
        let (argument, tail) = match rest {
            [b'"', tail @ ..] => double_quoted(tail)?,
            [b'\'', tail @ ..] => {
                let end = tail
                    .iter()
                    .position(|byte| *byte == b'\'')
                    .ok_or("unterminated single quote")?;
                (tail[..end].to_vec(), &tail[end + 1..])
            }
            _ => {
                let end = rest.iter().position(|byte| is_blank(*byte)).unwrap_or(rest.len());
                (home(&rest[..end]), &rest[end..])
            }
        };
        if tail.first().is_some_and(|byte| !is_blank(*byte)) {
            return Err("command arguments not separated by whitespace".to_owned());
        }
        words.arguments.push(argument);
        rest = tail;
    }
}

/// The text up to the closing quote, and what follows it.
fn double_quoted(text: &[u8]) -> Result<(Vec<u8>, &[u8]), String> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        match text.get(at) {
            None => return Err("unterminated double quote".to_owned()),
            Some(b'"') => return Ok((found, &text[at + 1..])),
            Some(b'\\') => {
                let (byte, length) = escape(&text[at + 1..]).ok_or_else(|| {
                    format!("invalid escape sequence in string (starting at offset {at})")
                })?;
                found.push(byte);
                at += 1 + length;
            }
            Some(byte) => {
                found.push(*byte);
                at += 1;
            }
        }
    }
}

/// The byte that stands for an escape sequence, and the sequence's length.
fn escape(text: &[u8]) -> Option<(u8, usize)> {
    let simple = match text.first()? {
        b'a' => 7,
        b'b' => 8,
        b'f' => 12,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'v' => 11,
        quoted @ (b'\\' | b'"' | b'\'' | b'?') => *quoted,
        b'x' => return number(text.get(1..3)?, 16).map(|byte| (byte, 3)),
        b'0'..=b'7' => return number(text.get(..3)?, 8).map(|byte| (byte, 3)),
        _ => return None,
    };
    Some((simple, 1))
}

/// A byte in digits of `radix`; 0 would end a string and is refused.
fn number(digits: &[u8], radix: u32) -> Option<u8> {
    let all = digits.iter().all(|digit| char::from(*digit).is_digit(radix));
    let text = std::str::from_utf8(digits).ok().filter(|_| all)?;
    u8::from_str_radix(text, radix).ok().filter(|byte| *byte != 0)
}

/// `~` at the beginning of a word is the user's home.
fn home(word: &[u8]) -> Vec<u8> {
    use std::os::unix::ffi::OsStringExt;
    match word {
        [b'~', rest @ ..] if rest.is_empty() || rest.starts_with(b"/") => {
            match std::env::var_os("HOME") {
                Some(home) => [home.into_vec(), rest.to_vec()].concat(),
                None => word.to_vec(),
            }
        }
        _ => word.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &[&[u8]], pipe: Option<&str>) -> Line {
        Line::Call(Words {
            name: name.to_owned(),
            arguments: arguments.iter().map(|word| word.to_vec()).collect(),
            pipe: pipe.map(|text| text.as_bytes().to_vec()),
        })
    }

    #[test]
    fn lines_are_read_as_guestfish_reads_them() {
        let cases: &[(&str, bool, Line)] = &[
            ("", false, Line::Nothing),
            ("  # comment", false, Line::Nothing),
            ("ls /", false, call("ls", &[b"/"], None)),
            ("\tls\t/ ", false, call("ls", &[b"/"], None)),
            ("-ls /", true, call("ls", &[b"/"], None)),
            ("- - ls /", true, call("ls", &[b"/"], None)),
            ("!exit 3", false, Line::Host(b"exit 3".into())),
            ("-!exit 3", true, Line::Host(b"exit 3".into())),
            ("<! echo ls /", false, Line::Lines(b" echo ls /".into())),
            // A # is a comment at the beginning alone.
            ("echo a # b", false, call("echo", &[b"a", b"#", b"b"], None)),
            (
                r#"write /f "a\tb\"\\\101\xff""#,
                false,
                call("write", &[b"/f", b"a\tb\"\\A\xff"], None),
            ),
            (r#"echo 'a\n"b'"#, false, call("echo", &[b"a\\n\"b"], None)),
            (r#"echo """#, false, call("echo", &[b""], None)),
            // Quotes inside of a word are data.
            (r#"echo pre"mid"post \n"#, false, call("echo", &[b"pre\"mid\"post", b"\\n"], None)),
            ("cat /f | grep -v x", false, call("cat", &[b"/f"], Some(" grep -v x"))),
            ("cat /f |sort", false, call("cat", &[b"/f"], Some("sort"))),
            ("echo x|y", false, call("echo", &[b"x|y"], None)),
            ("echo a -b", false, call("echo", &[b"a", b"-b"], None)),
        ];
        for (text, forgiven, expected) in cases {
            let found = parse(text.as_bytes()).unwrap();
            assert_eq!(found, (*forgiven, expected.clone()), "{text}");
        }
    }

    #[test]
    fn broken_lines_are_explained() {
        for (text, expected) in [
            (r#"echo "abc"#, "unterminated double quote"),
            ("echo 'abc", "unterminated single quote"),
            (r#"echo "a"b"#, "not separated by whitespace"),
            (r#"echo "ab\q""#, "(starting at offset 2)"),
            (r#"echo "\000""#, "(starting at offset 0)"),
            (r#"echo "\x+1""#, "(starting at offset 0)"),
            (r#"echo "\777""#, "(starting at offset 0)"),
        ] {
            let message = parse(text.as_bytes()).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let many = format!("echo {}", "x ".repeat(64));
        assert_eq!(parse(many.as_bytes()).unwrap_err(), "too many arguments");
        assert!(parse(format!("echo {}", "x ".repeat(63)).as_bytes()).is_ok());
    }
}
