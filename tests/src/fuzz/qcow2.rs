// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QCOW2: everything that the crate does with an image.

use super::subject::{Mode, OWN, Subject, exercise, has_no_corruption};
use super::{Case, Image, disk};
use std::sync::{Arc, LazyLock};
use std::time::UNIX_EPOCH;
use tranship_block::{
    BlockDevice, CheckReport, MemoryDevice, Repair, Result, SectorCipher, Slice, Span, Storage,
};
use tranship_luks::{Limits, legacy_aes_cipher, unlock_cipher};
use tranship_qcow2::{
    Amendments, BitmapContent, Encryption, Header, OpenOptions, Qcow2, ResizeOptions, add_bitmap,
    amend, apply_snapshot, bitmaps, check, check_read_only, clear_bitmap, create_snapshot,
    delete_snapshot, empty, give_back, remove_bitmap, repair_leaks, resize, snapshots,
};

const BACKING: u8 = OWN;
const KEY: u8 = OWN + 1;
const VARIANT: u8 = OWN + 2;

static BELOW: LazyLock<Arc<MemoryDevice>> = LazyLock::new(|| {
    Arc::new(MemoryDevice::read_only((0..150_001_u32).map(|at| (at % 251) as u8 | 1).collect()))
});

/// Little enough for thousands of tries in a second.
pub(crate) const CHEAP: Limits = Limits {
    key_bytes: 512,
    stripes: 10_000,
    pbkdf2_iterations: 5000,
    argon2_memory: 1 << 20,
    argon2_work: 4 << 20,
};

#[derive(Debug)]
struct Parts {
    backing: bool,
    cipher: Option<Arc<dyn SectorCipher>>,
    data: Option<Arc<Image>>,
}

impl Parts {
    fn options(&self, mode: Mode) -> OpenOptions {
        OpenOptions {
            read_only: mode != Mode::Write,
            backing: self.backing.then(|| -> Arc<dyn BlockDevice> { BELOW.clone() }),
            data_file: self.data.clone().map(|data| -> Arc<dyn Storage> { data }),
            cipher: self.cipher.clone(),
        }
    }
}

impl Subject for Parts {
    fn open(&self, file: &Arc<Image>, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let image = match mode {
            Mode::Write => Qcow2::open(file.clone(), self.options(mode))?,
            _ => Qcow2::open_read_only_with(file.clone(), self.options(mode))?,
        };
        Ok(Box::new(image))
    }

    fn check(&self, storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
        match repair {
            Repair::Nothing => check_read_only(&storage),
            _ => check(storage, repair),
        }
    }

    fn payload(&self, file: &Arc<Image>) -> Option<Arc<Image>> {
        let file = self.data.as_ref().unwrap_or(file).clone();
        self.cipher.is_none().then_some(file)
    }

    fn fork(&self) -> Box<dyn Subject> {
        let data = self.data.as_ref().map(|data| Arc::new(data.copy()));
        Box::new(Self { backing: self.backing, cipher: self.cipher.clone(), data })
    }

    fn is_checked(&self) -> bool {
        false
    }
}

pub(crate) fn run(input: &[u8]) {
    let case = Case::decode(input);
    let file = Arc::new(case.files[0].image().view(true));
    let Ok(header) = Header::read(&file) else {
        let refused = Qcow2::open_read_only_with(file.clone(), OpenOptions::default());
        assert!(refused.is_err() && check_read_only(&file).is_err());
        return;
    };
    let cipher =
        header.encryption().filter(|_| case.has(KEY)).and_then(|method| key(&file, method).ok());
    let data = header.has_data_file().then(|| Arc::new(case.files[1].image()));
    let parts = Parts { backing: header.backing.is_some() && case.has(BACKING), cipher, data };
    exercise(&parts, &file, &case);
    for snapshot in snapshots(&file).unwrap_or_default().iter().take(3) {
        let options = parts.options(Mode::Read);
        if let Ok(image) = Qcow2::open_snapshot(file.clone(), &snapshot.id, options) {
            disk::look(
                &image,
                parts.payload(&file).as_deref().map(|file| -> &dyn BlockDevice { file }),
            );
        }
    }
    for bitmap in bitmaps(&file).unwrap_or_default().iter().take(3) {
        if let Ok(content) = BitmapContent::read(&file, &bitmap.name) {
            content.dirty_bytes();
        }
    }
    if case.has(VARIANT) {
        change(&parts, &file, &case);
    }
}

fn key(file: &Arc<Image>, method: Encryption) -> Result<Arc<dyn SectorCipher>> {
    match method {
        Encryption::Aes => legacy_aes_cipher(b"fuzz"),
        Encryption::Luks { offset, len } => {
            let file: Arc<dyn BlockDevice> = file.clone();
            let header: Arc<dyn BlockDevice> = Arc::new(Slice::new(file, Span::new(offset, len))?);
            unlock_cipher(&header, b"fuzz", &CHEAP)
        }
    }
}

/// Changes the image as a whole: a sound one stays sound, whether it works or not.
fn change(parts: &Parts, file: &Image, case: &Case) {
    let storage = Arc::new(file.copy());
    let dynamic: Arc<dyn Storage> = storage.clone();
    let is_sound = check_read_only(&storage).is_ok_and(|report| report.corruptions == 0);
    let options = parts.options(Mode::Write);
    let sized = ResizeOptions {
        allow_shrink: true,
        backing: options.backing,
        data_file: parts.data.as_ref().map(|data| -> Arc<dyn Storage> { Arc::new(data.copy()) }),
        ..ResizeOptions::default()
    };
    let size = u64::from(case.ops[0].place) << (case.ops[0].len % 20);
    let first = |names: Vec<String>| names.first().cloned().unwrap_or_default();
    let snapshot =
        || first(snapshots(&storage).unwrap_or_default().into_iter().map(|one| one.id).collect());
    let bitmap =
        || first(bitmaps(&storage).unwrap_or_default().into_iter().map(|one| one.name).collect());
    let result: Result<()> = match case.variant % 16 {
        0 => create_snapshot(&*storage, "new", UNIX_EPOCH).map(drop),
        1 => apply_snapshot(&*storage, &snapshot()),
        2 => delete_snapshot(&*storage, &snapshot()),
        3 => add_bitmap(&*storage, "new", None),
        4 => remove_bitmap(&*storage, &bitmap()),
        5 => clear_bitmap(&*storage, &bitmap()),
        6 => resize(&dynamic, size, &sized),
        7 => empty(&*storage),
        8 => give_back(&*storage),
        9 => repair_leaks(&*storage).map(drop),
        number @ 10..=13 => {
            let refcount_bits = Some([1, 8, 32, 64][usize::from(number) - 10]);
            amend(&*storage, &Amendments { refcount_bits, ..Amendments::default() })
        }
        number => {
            let version = Some(u32::from(number) - 12);
            amend(&*storage, &Amendments { version, ..Amendments::default() })
        }
    };
    if is_sound {
        has_no_corruption(&result, &check_read_only(&storage.view(true)));
    }
    if let Ok(disk) = parts.open(&storage, Mode::Read) {
        disk::look(&*disk, None);
    }
}
