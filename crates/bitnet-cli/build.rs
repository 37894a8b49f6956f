//! Tells the program which commit it was built from, for the records of `bitnet bench`.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Outside a checkout of this project (a package from a registry) there is no commit to name.
    let commit = match git(&["ls-files", "--error-unmatch", "build.rs"]) {
        Some(_) => git(&["rev-parse", "--short=10", "HEAD"]).unwrap_or_default(),
        None => String::new(),
    };
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|_| !commit.is_empty())
    {
        println!("cargo:rerun-if-changed={log}");
    }
    println!("cargo:rustc-env=BITNET_COMMIT={commit}");
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
