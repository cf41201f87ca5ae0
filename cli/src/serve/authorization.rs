// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may connect: `--object authz-simple,…` and `--object authz-list,…`.

use crate::failure::Failure;
use std::collections::BTreeMap;

/// Decides by the distinguished name of a client's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Authorization {
    /// This one and nobody else.
    Simple(String),
    /// By the first rule that fits.
    List {
        rules: Vec<Rule>,
        /// What becomes of those for whom there is none.
        others: bool,
    },
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pattern: String,
    is_glob: bool,
    allows: bool,
}

/// A rule of which not all has been read.
#[derive(Debug, Default)]
struct Draft {
    pattern: Option<String>,
    is_glob: bool,
    allows: Option<bool>,
}

/// Whether objects of this type are for this module.
pub(super) fn is_meant(kind: &str) -> bool {
    kind.starts_with("authz-")
}

impl Authorization {
    /// Reads what follows the object's type; its id and what it is.
    pub(super) fn parse(
        kind: &str,
        parts: impl Iterator<Item = (String, Option<String>)>,
    ) -> Result<(String, Self), Failure> {
        let (mut id, mut identity, mut others) = (None, None, false);
        let mut drafts: BTreeMap<usize, Draft> = BTreeMap::new();
        if !matches!(kind, "authz-simple" | "authz-list") {
            return Err(Failure::usage(format!("there is no {kind} here"))
                .hint("authz-simple,id=ID,identity=NAME and authz-list,id=ID,… are"));
        }
        let is_list = kind == "authz-list";
        for (name, value) in parts {
            let value = value.unwrap_or_else(|| "on".to_owned());
            let unexpected = || Failure::usage(format!("Parameter '{name}' is unexpected"));
            match name.as_str() {
                "id" => id = Some(value),
                "identity" if !is_list => identity = Some(value),
                "policy" if is_list => others = policy(&name, &value)?,
                _ if is_list => {
                    let rule = name.strip_prefix("rules.").and_then(|rest| rest.split_once('.'));
                    let (number, field) = rule.ok_or_else(unexpected)?;
                    let number = number.parse().map_err(|_| unexpected())?;
                    let draft = drafts.entry(number).or_default();
                    match field {
                        "match" => draft.pattern = Some(value),
                        "policy" => draft.allows = Some(policy(&name, &value)?),
                        "format" => draft.is_glob = format(&name, &value)?,
                        _ => return Err(unexpected()),
                    }
                }
                _ => return Err(unexpected()),
            }
        }
        let missing = |name: &str| Failure::usage(format!("Parameter '{name}' is missing"));
        let id = id.ok_or_else(|| missing("id"))?;
        if !is_list {
            return Ok((id, Self::Simple(identity.ok_or_else(|| missing("identity"))?)));
        }
        let mut rules = Vec::with_capacity(drafts.len());
        for (expected, (number, draft)) in drafts.into_iter().enumerate() {
            if number != expected {
                return Err(missing(&format!("rules.{expected}.match")));
            }
            let field = |field: &str| missing(&format!("rules.{number}.{field}"));
            rules.push(Rule {
                pattern: draft.pattern.ok_or_else(|| field("match"))?,
                allows: draft.allows.ok_or_else(|| field("policy"))?,
                is_glob: draft.is_glob,
            });
        }
        Ok((id, Self::List { rules, others }))
    }

    /// Whether the client of this name may connect.
    pub(super) fn allows(&self, name: &str) -> bool {
        match self {
            Self::Simple(identity) => identity == name,
            Self::List { rules, others } => {
                rules.iter().find(|rule| rule.fits(name)).map_or(*others, |rule| rule.allows)
            }
        }
    }
}

impl Rule {
    fn fits(&self, name: &str) -> bool {
        if self.is_glob { is_like(name, &self.pattern) } else { self.pattern == name }
    }
}

/// Whether `text` is like `pattern`, in which `*` stands for anything and `?` for a letter.
fn is_like(text: &str, pattern: &str) -> bool {
    let (text, pattern): (Vec<char>, Vec<char>) =
        (text.chars().collect(), pattern.chars().collect());
    let (mut at, mut here) = (0, 0);
    // Where the last star was, and how far it reached.
    let mut star: Option<(usize, usize)> = None;
    while at < text.len() {
        match pattern.get(here) {
            Some('*') => {
                star = Some((here, at));
                here += 1;
            }
            Some(letter) if *letter == '?' || text.get(at) == Some(letter) => {
                at += 1;
                here += 1;
            }
            _ => {
                let Some((before, reached)) = star else { return false };
                star = Some((before, reached + 1));
                (at, here) = (reached + 1, before + 1);
            }
        }
    }
    pattern.iter().skip(here).all(|letter| *letter == '*')
}

fn policy(name: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "allow" => Ok(true),
        "deny" => Ok(false),
        _ => Err(Failure::usage(format!("Parameter '{name}' does not accept value '{value}'"))),
    }
}

fn format(name: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "exact" => Ok(false),
        "glob" => Ok(true),
        _ => Err(Failure::usage(format!("Parameter '{name}' does not accept value '{value}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::options;

    fn parsed(object: &str) -> Result<Authorization, Failure> {
        let mut parts = options::split(object).into_iter();
        let (kind, _) = parts.next().unwrap();
        Authorization::parse(&kind, parts).map(|(id, authorization)| {
            assert_eq!(id, "a");
            authorization
        })
    }

    #[test]
    fn names_are_let_in_by_the_first_rule_that_fits() {
        let simple = "authz-simple,id=a,identity=C=GB,,CN=x";
        let list = "authz-list,id=a,rules.0.match=C=GB,,CN=bad*,rules.0.policy=deny,\
                    rules.0.format=glob,rules.1.match=C=GB,,CN=?*,rules.1.policy=allow,\
                    rules.1.format=glob,rules.2.match=CN=*,rules.2.policy=allow";
        let open = "authz-list,id=a,policy=allow,rules.0.match=CN=x,rules.0.policy=deny";
        for (object, name, expected) in [
            (simple, "C=GB,CN=x", true),
            (simple, "C=GB,CN=xy", false),
            (simple, "", false),
            (list, "C=GB,CN=x", true),
            (list, "C=GB,CN=", false),
            (list, "C=GB,CN=badly", false),
            (list, "C=DE,CN=x", false),
            (list, "CN=*", true),
            (list, "CN=x", false),
            (open, "CN=x", false),
            (open, "CN=y", true),
        ] {
            assert_eq!(parsed(object).unwrap().allows(name), expected, "{object} {name}");
        }
    }

    #[test]
    fn patterns_are_globs() {
        for (text, pattern, expected) in [
            ("", "", true),
            ("", "*", true),
            ("a", "", false),
            ("abc", "a?c", true),
            ("abcabd", "*abd", true),
            ("abcabd", "a*b*d*", true),
            ("abcabd", "a*b*c", false),
            ("ü", "?", true),
        ] {
            assert_eq!(is_like(text, pattern), expected, "{text} {pattern}");
        }
    }

    #[test]
    fn mistakes_are_told_in_qemus_words() {
        for (object, expected) in [
            ("authz-simple,id=a", "Parameter 'identity' is missing"),
            ("authz-simple,identity=x", "Parameter 'id' is missing"),
            ("authz-simple,id=a,policy=deny", "Parameter 'policy' is unexpected"),
            ("authz-list,id=a,policy=foo", "Parameter 'policy' does not accept value 'foo'"),
            ("authz-list,id=a,rules.0.match=x", "Parameter 'rules.0.policy' is missing"),
            ("authz-list,id=a,rules.1.match=x", "Parameter 'rules.0.match' is missing"),
            ("authz-list,id=a,rules.x.match=x", "Parameter 'rules.x.match' is unexpected"),
            ("authz-pam,id=a,service=x", "there is no authz-pam here"),
        ] {
            assert_eq!(parsed(object).unwrap_err().message(), expected);
        }
    }
}
