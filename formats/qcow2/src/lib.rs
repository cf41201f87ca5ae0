// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QCOW2 images: read, write, create, overlays.
