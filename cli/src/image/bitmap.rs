// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image bitmap`: the persistent bitmaps of an image.

use super::console::Console;
use super::sizes::{self, SizeError};
use super::source::{self, Opening, Source};
use crate::args::image::{BitmapAction, BitmapArgs, Naming};
use crate::failure::Failure;
use tranship_block::Storage;
use tranship_formats::{Format, Layer};
use tranship_qcow2::BitmapContent;

/// Does all actions with one bitmap, in their order.
pub(crate) fn run(args: &BitmapArgs, console: Console) -> Result<u8, Failure> {
    let granularity = args.granularity.as_deref().map(granularity).transpose()?;
    let has = |wanted: fn(&BitmapAction) -> bool| args.actions.iter().any(wanted);
    if args.actions.is_empty() {
        return Err(Failure::usage(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if granularity.is_some() && !has(|action| *action == BitmapAction::Add) {
        return Err(Failure::usage("granularity only supported with --add"));
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return Err(Failure::usage("-F only supported with -b"));
    }
    if args.source_file.is_some() && !has(|action| matches!(action, BitmapAction::Merge(_))) {
        return Err(Failure::usage("Merge bitmap source file only supported with --merge"));
    }
    let [name, bitmap] = args.names.as_slice() else {
        return Err(source::usage(console, "bitmap", "Expecting filename and bitmap name"));
    };
    let bitmap =
        bitmap.to_str().ok_or_else(|| Failure::usage("the bitmap's name is not in UTF-8"))?;
    let target =
        Opening::writing(&args.naming, args.format.format.as_deref()).open_file(name, console)?;
    let source = match &args.source_file {
        None => None,
        Some(name) => {
            let naming = Naming { image_opts: false, ..args.naming.clone() };
            let opening = Opening::reading(&naming, args.source_format.as_deref());
            Some(opening.open_file(name, console)?)
        }
    };
    for action in &args.actions {
        change(&target, bitmap, action, granularity, source.as_ref()).map_err(|failure| {
            failure.within(format!("Operation {} on bitmap {bitmap} failed", verb(action)))
        })?;
    }
    Ok(0)
}

fn granularity(text: &str) -> Result<u64, Failure> {
    sizes::parse(text).map_err(|error| {
        Failure::usage(match error {
            SizeError::Invalid => format!("Invalid granularity specified: '{text}'."),
            SizeError::OutOfRange => {
                format!("Invalid granularity specified. Must be between 1 and {}.", i64::MAX)
            }
        })
    })
}

fn verb(action: &BitmapAction) -> &'static str {
    match action {
        BitmapAction::Add => "add",
        BitmapAction::Remove => "remove",
        BitmapAction::Clear => "clear",
        BitmapAction::Enable => "enable",
        BitmapAction::Disable => "disable",
        BitmapAction::Merge(_) => "merge",
    }
}

fn change(
    target: &Source,
    bitmap: &str,
    action: &BitmapAction,
    granularity: Option<u64>,
    source: Option<&Source>,
) -> Result<(), Failure> {
    let storage = storage(target)?;
    match action {
        BitmapAction::Add => tranship_qcow2::add_bitmap(storage, bitmap, granularity)?,
        BitmapAction::Remove => tranship_qcow2::remove_bitmap(storage, bitmap)?,
        BitmapAction::Clear => tranship_qcow2::clear_bitmap(storage, bitmap)?,
        BitmapAction::Enable => tranship_qcow2::enable_bitmap(storage, bitmap)?,
        BitmapAction::Disable => tranship_qcow2::disable_bitmap(storage, bitmap)?,
        BitmapAction::Merge(from) => {
            let layer = source.unwrap_or(target).opened.layers.first();
            let Some(layer) = layer.filter(|layer| layer.format == Format::Qcow2) else {
                return Err(Failure::usage(format!("there is no bitmap '{from}'")));
            };
            let content = BitmapContent::read(&layer.file, from)?;
            tranship_qcow2::merge_bitmap(storage, bitmap, &content)?;
        }
    }
    Ok(())
}

fn storage(target: &Source) -> Result<&dyn Storage, Failure> {
    match target.opened.layers.first() {
        Some(Layer { format: Format::Qcow2, storage: Some(storage), .. }) => Ok(&**storage),
        _ => Err(Failure::usage(format!(
            "images of format {} have no bitmaps",
            target.opened.format
        ))),
    }
}

/// Gives the image `target` what the source's bitmaps have.
pub(crate) fn copy_all(
    sources: &[Source],
    target: &Source,
    skip_broken: bool,
    console: Console,
) -> Result<(), Failure> {
    let missing = || Failure::usage("Source lacks bitmap support");
    let [source] = sources else { return Err(missing()) };
    let layer = source.opened.layers.first().filter(|layer| layer.format == Format::Qcow2);
    let layer = layer.ok_or_else(missing)?;
    let storage = storage(target)?;
    for bitmap in tranship_qcow2::bitmaps(&layer.file)? {
        let name = bitmap.name.as_str();
        if bitmap.is_in_use {
            if skip_broken {
                console.warn(&format!("Skipping inconsistent bitmap '{name}'"));
                continue;
            }
            return Err(Failure::usage(format!("Cannot copy inconsistent bitmap '{name}'")).hint(
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            ));
        }
        tranship_qcow2::add_bitmap(storage, name, Some(bitmap.granularity))?;
        let content = BitmapContent::read(&layer.file, name)?;
        tranship_qcow2::merge_bitmap(storage, name, &content)?;
        if !bitmap.is_enabled {
            tranship_qcow2::disable_bitmap(storage, name)?;
        }
    }
    Ok(())
}
