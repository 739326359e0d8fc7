from imitate_ds.data.shard_urls import cache_folder_name, is_remote, join_url, lower_scheme, without_credentials


def test_urls_are_remote_and_paths_are_not():
    assert all(map(is_remote, ("http://h/x", "https://h", "s3://bucket/x", "gs://bucket", "memory://x")))
    assert not any(map(is_remote, ("shards/openi", "/data/x", "C:\\data", "C:/data", "./a:b", "a//b", "")))


def test_a_query_stays_behind_the_name_of_a_file():
    assert join_url("https://host/a/?token=x", "train-000000.tar") == "https://host/a/train-000000.tar?token=x"
    assert join_url("s3://bucket/a/", "index.json") == "s3://bucket/a/index.json"


def test_what_is_shown_has_neither_password_nor_token():
    assert without_credentials("https://ann:secret@host:8443/a/?token=x") == "https://host:8443/a"


def test_a_new_token_and_a_capital_scheme_find_the_same_cached_folder():
    names = {
        cache_folder_name(without_credentials(lower_scheme(url)))
        for url in ("https://host/a b?token=x", "HTTPS://ann:secret@host/a b/?token=y")
    }
    assert len(names) == 1
    assert names.pop().endswith("-a_b")
