//! `docs/formats.md` shows the pictures of the source, unchanged.

use std::path::Path;

#[test]
fn pictures_in_the_documentation_are_those_of_the_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(root.join("../../docs/formats.md")).unwrap();
    let mut pictures = 0;
    for entry in std::fs::read_dir(root.join("src/pack")).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap();
        let header: Vec<&str> = source
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .map(|line| line.strip_prefix(' ').unwrap_or(line))
            .collect();
        for picture in header.join("\n").split("```text\n").skip(1) {
            let picture = picture.split("```").next().unwrap_or_default();
            assert!(document.contains(picture), "{}:\n{picture}", path.display());
            pictures += 1;
        }
    }
    assert_eq!(pictures, 10, "one for each ternary layout, two for floats");
}
