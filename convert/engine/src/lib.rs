// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries a conversion out, from the source to the target.
