mod networks;

#[test]
fn a() {}
