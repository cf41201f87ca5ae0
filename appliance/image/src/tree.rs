// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of an image before it is packed, in one fixed order.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Where the bytes of a file come from.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A file of the host or the cache, read when the image is packed.
    Host(PathBuf),
    /// Bytes made by the builder.
    Bytes(Vec<u8>),
}

/// One entry of an image.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    /// A directory.
    Dir,
    /// A regular file, executable or not.
    File { content: Content, executable: bool },
    /// A symbolic link.
    Link(PathBuf),
}

/// An image's entries by relative path; parents come before their children.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree(BTreeMap<PathBuf, Node>);

impl Tree {
    /// Puts `node` at `path` (a leading `/` is ignored) and makes its parent directories.
    ///
    /// The first node at a path stays: two tools bring the same library.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if the path is not canonical, leads through something else than a
    /// directory, or is already taken by another kind of node.
    pub(crate) fn put(&mut self, path: impl AsRef<Path>, node: Node) -> Result<()> {
        let path = path.as_ref();
        let mut at = PathBuf::new();
        let mut parts = path.components().peekable();
        while let Some(part) = parts.next() {
            match part {
                Component::RootDir | Component::CurDir => continue,
                Component::Normal(name) => at.push(name),
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(Error::new(
                        ErrorKind::Usage,
                        format!("image path {} is not canonical", path.display()),
                    ));
                }
            }
            if parts.peek().is_some() {
                match self.0.entry(at.clone()).or_insert(Node::Dir) {
                    Node::Dir => {}
                    _ => {
                        return Err(Error::new(
                            ErrorKind::Usage,
                            format!(
                                "image path {} leads through {}, which is no directory",
                                path.display(),
                                at.display()
                            ),
                        ));
                    }
                }
            }
        }
        let kind = std::mem::discriminant(&node);
        if std::mem::discriminant(self.0.entry(at).or_insert(node)) != kind {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("image path {} is already taken by another kind of file", path.display()),
            ));
        }
        Ok(())
    }

    /// Puts a text file.
    pub(crate) fn put_text(&mut self, path: &str, text: String) -> Result<()> {
        self.put(path, Node::File { content: Content::Bytes(text.into_bytes()), executable: false })
    }

    /// Puts empty directories.
    pub(crate) fn put_dirs(&mut self, paths: &[&str]) -> Result<()> {
        paths.iter().try_for_each(|path| self.put(path, Node::Dir))
    }

    /// All entries, parents first, otherwise by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.0.iter().map(|(path, node)| (path.as_path(), node))
    }

    /// The host files that the tree takes its content from.
    pub(crate) fn host_files(&self) -> impl Iterator<Item = &Path> {
        self.0.values().filter_map(|node| match node {
            Node::File { content: Content::Host(path), .. } => Some(path.as_path()),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_made_and_come_first() {
        let mut tree = Tree::default();
        tree.put_text("/usr/lib/x", "x".into()).unwrap();
        tree.put("/bin", Node::Link("usr/bin".into())).unwrap();
        let paths: Vec<_> = tree.iter().map(|(p, _)| p.display().to_string()).collect();
        assert_eq!(paths, ["bin", "usr", "usr/lib", "usr/lib/x"]);
        assert!(tree.put_text("bin/sh", String::new()).is_err());
        assert!(tree.put_text("a/../../b", String::new()).is_err());
        assert!(tree.put_text("usr/lib", String::new()).is_err());
    }
}
