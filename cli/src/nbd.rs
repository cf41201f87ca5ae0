// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `nbd info`: what an NBD server offers, with nbdinfo's output and exit codes.

pub(crate) mod asking;
mod content;
mod map;
mod show;

use crate::args::NbdArgs;
use crate::args::nbd::{InfoArgs, NbdCommand};
use crate::failure::Failure;
use crate::personality::Personality;
use crate::stdout;
use asking::{Connected, Export, Protocol, Server};
use show::Shown;

/// What `--map` tells unless something else is wanted.
const ALLOCATION: &str = "base:allocation";

/// Does what the options ask for. The exit code of a failure is 1.
pub(crate) fn run(personality: Personality, args: &NbdArgs) -> Result<u8, Failure> {
    let NbdCommand::Info(args) = &args.command;
    info(personality, args).map_err(|failure| failure.exiting_with(1))
}

fn info(personality: Personality, args: &InfoArgs) -> Result<u8, Failure> {
    let [uri] = args.uris.as_slice() else {
        let wrong = Failure::usage("expected one URI of an NBD server");
        return Err(match personality {
            Personality::Nbdinfo => wrong,
            _ => wrong.hint("see `tranship nbd info --help`"),
        });
    };
    let server = Server::named(&uri.to_string_lossy())?;
    if args.list {
        return list(&server, args);
    }
    let context = args.map.as_deref();
    if context.is_none() && !args.size && args.can.is_none() {
        return show(&server, args);
    }
    let connected = server.connect(context.filter(|context| *context != ALLOCATION))?;
    if args.size {
        stdout::print(&format!("{}\n", connected.export.size))?;
        return Ok(0);
    }
    if let Some(name) = &args.can {
        let known = show::feature(name, connected.protocol, connected.export.flags);
        return match known {
            Some(true) => Ok(0),
            Some(false) => Ok(2),
            None => Err(Failure::usage(format!("unknown --can or --is option: {name}"))),
        };
    }
    map::print(&connected, context.unwrap_or(ALLOCATION), args.totals, args.json)?;
    Ok(0)
}

/// Shows one export.
fn show(server: &Server, args: &InfoArgs) -> Result<u8, Failure> {
    let (protocol, export) = server.describe()?;
    // Only now: a server may take one client at a time.
    let content =
        if args.no_content { None } else { Some(content::of(server.connect(None)?.device())?) };
    let shown = Shown { export: &export, uri: Some(server.uri()), content };
    print(protocol, &[shown], args.json)
}

/// Shows all exports of a server.
fn list(server: &Server, args: &InfoArgs) -> Result<u8, Failure> {
    let (protocol, exports) = server.list()?;
    let of = |export: &Export| -> Result<Option<String>, Failure> {
        if !args.content {
            return Ok(None);
        }
        let connected: Connected = server.with_export(&export.name).connect(None)?;
        Ok(Some(content::of(connected.device())?))
    };
    let shown = exports.iter().map(|export| {
        let uri = Some(server.with_export(&export.name).uri());
        Ok(Shown { export, uri, content: of(export)? })
    });
    let shown = shown.collect::<Result<Vec<_>, Failure>>()?;
    print(protocol, &shown, args.json)
}

fn print(protocol: Protocol, exports: &[Shown<'_>], as_json: bool) -> Result<u8, Failure> {
    if as_json {
        let all: Vec<_> = exports.iter().map(show::json).collect();
        stdout::json(&serde_json::json!({
            "protocol": "newstyle-fixed",
            "TLS": protocol.tls,
            "structured": protocol.structured || protocol.extended,
            "extended": protocol.extended,
            "exports": all,
        }))?;
    } else {
        let exports = exports.iter().map(show::text);
        let text: String = std::iter::once(show::protocol_line(protocol)).chain(exports).collect();
        stdout::print(&text)?;
    }
    Ok(0)
}
