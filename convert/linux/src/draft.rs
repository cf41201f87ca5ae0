// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A plan in the making: edits of one file come together in one step.

use crate::plan::{Blocker, Plan, Step, Warning};
use std::collections::BTreeMap;
use tranship_inspect::{FileKind, GuestTree, Ownership, Result};
use tranship_protocol::GuestPath;

/// Largest configuration file that is edited.
const MAX_EDITED: u64 = 4 << 20;
/// A file that everybody may read and root may write.
pub(crate) const PLAIN: Ownership = Ownership { mode: 0o644, uid: 0, gid: 0 };

/// A file with the contents it has and the ones it will have.
struct Edited {
    path: GuestPath,
    old: Option<Vec<u8>>,
    new: Vec<u8>,
    ownership: Ownership,
    why: Vec<String>,
}

/// A plan in the making.
pub(crate) struct Draft<'a> {
    pub(crate) tree: &'a dyn GuestTree,
    edited: Vec<Edited>,
    by_path: BTreeMap<GuestPath, usize>,
    after: Vec<Step>,
    programs: Vec<Step>,
    pub(crate) plan: Plan,
    pub(crate) blockers: Vec<Blocker>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(tree: &'a dyn GuestTree) -> Self {
        Self {
            tree,
            edited: Vec::new(),
            by_path: BTreeMap::new(),
            after: Vec::new(),
            programs: Vec::new(),
            plan: Plan::default(),
            blockers: Vec::new(),
        }
    }

    pub(crate) fn block(&mut self, code: &'static str, what: String, remedy: &str) {
        self.blockers.push(Blocker { code, what, remedy: remedy.to_owned() });
    }

    pub(crate) fn warn(&mut self, code: &'static str, what: String) {
        self.plan.warnings.push(Warning { code, what });
    }

    pub(crate) fn note(&mut self, note: String) {
        self.plan.notes.push(note);
    }

    /// What the file will hold as far as the plan goes; `None` if it will not be there.
    pub(crate) fn content(&self, path: &GuestPath) -> Result<Option<Vec<u8>>> {
        if let Some(edited) = self.by_path.get(path).and_then(|at| self.edited.get(*at)) {
            return Ok(Some(edited.new.clone()));
        }
        match self.tree.stat(path)? {
            Some(stat) if stat.kind == FileKind::File => self.tree.read(path, MAX_EDITED).map(Some),
            _ => Ok(None),
        }
    }

    /// Gives the file these contents, unless it has them already.
    pub(crate) fn write(
        &mut self,
        path: &GuestPath,
        new: Vec<u8>,
        ownership: Ownership,
        why: &str,
    ) -> Result<()> {
        let old = self.content(path)?;
        if old.as_ref() == Some(&new) {
            return Ok(());
        }
        if let Some(edited) = self.by_path.get(path).and_then(|at| self.edited.get_mut(*at)) {
            edited.new = new;
            if !edited.why.iter().any(|known| known == why) {
                edited.why.push(why.to_owned());
            }
            return Ok(());
        }
        self.by_path.insert(path.clone(), self.edited.len());
        let (path, why) = (path.clone(), vec![why.to_owned()]);
        self.edited.push(Edited { path, old, new, ownership, why });
        Ok(())
    }

    /// Lets `change` rewrite a file that is there.
    pub(crate) fn edit(
        &mut self,
        path: &GuestPath,
        why: &str,
        change: impl FnOnce(&mut Self, &[u8]) -> Vec<u8>,
    ) -> Result<()> {
        let Some(old) = self.content(path)? else { return Ok(()) };
        let new = change(self, &old);
        self.write(path, new, PLAIN, why)
    }

    /// Makes a link, unless it is there already.
    pub(crate) fn symlink(&mut self, path: &str, target: &str, why: &str) -> Result<()> {
        let path = GuestPath::of(path);
        if let Some(stat) = self.tree.lstat(&path)?
            && stat.kind == FileKind::Link
            && self.tree.read_link(&path)? == target.as_bytes()
        {
            return Ok(());
        }
        self.after.push(Step::Symlink { path, target: target.to_owned(), why: why.to_owned() });
        Ok(())
    }

    /// Removes a file or link, if it is there.
    pub(crate) fn remove(&mut self, path: &str, why: &str) -> Result<()> {
        let path = GuestPath::of(path);
        if self.tree.lstat(&path)?.is_some_and(|stat| stat.kind != FileKind::Directory) {
            self.after.push(Step::Remove { path, why: why.to_owned() });
        }
        Ok(())
    }

    /// Adds a step that comes after all files are written.
    pub(crate) fn later(&mut self, step: Step) {
        self.after.push(step);
    }

    /// Adds a step that runs a program of the guest, after everything else.
    pub(crate) fn run(&mut self, step: Step) {
        self.programs.push(step);
    }

    /// The steps that run programs of the guest.
    pub(crate) fn take_programs(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.programs)
    }

    /// Puts the steps so far into the plan, in order.
    pub(crate) fn finish(&mut self) {
        let writes = std::mem::take(&mut self.edited).into_iter().filter_map(|edited| {
            (edited.old.as_ref() != Some(&edited.new)).then(|| {
                let diff = diff(&edited);
                let Edited { path, new: content, ownership: new, why, .. } = edited;
                Step::WriteFile { path, content, new, why: why.join("; "), diff }
            })
        });
        self.plan.steps.extend(writes);
        self.plan.steps.append(&mut self.after);
    }
}

fn diff(edited: &Edited) -> String {
    let old = edited.old.as_deref().unwrap_or_default();
    let (Ok(old_text), Ok(new_text)) = (std::str::from_utf8(old), std::str::from_utf8(&edited.new))
    else {
        return String::new();
    };
    let path = edited.path.to_text();
    let before = if edited.old.is_some() { path.as_str() } else { "/dev/null" };
    similar::TextDiff::from_lines(old_text, new_text)
        .unified_diff()
        .context_radius(1)
        .header(before, &path)
        .to_string()
}
