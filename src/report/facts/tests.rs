//! Metadata as each trainer writes it, and as no honest one does.

use super::json as facts;
use serde_json::{json, Value};
use std::collections::BTreeMap;

fn metadata(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn of(pairs: &[(&str, &str)]) -> Value {
    facts(&metadata(pairs))
}

/// The values of `train_network.py` for a DreamBooth folder, LoCon through LyCORIS.
const SD_SCRIPTS: &[(&str, &str)] = &[
    ("modelspec.architecture", "stable-diffusion-v1/lora"),
    ("modelspec.date", "2024-05-17T20:15:00"),
    ("modelspec.encoder_layer", "2"),
    ("modelspec.implementation", "diffusers"),
    ("modelspec.prediction_type", "epsilon"),
    ("modelspec.resolution", "512x512"),
    ("modelspec.sai_model_spec", "1.0.0"),
    ("modelspec.title", "inkstyle"),
    ("ss_base_model_version", "sd_v1"),
    ("ss_batch_size_per_device", "2"),
    (
        "ss_bucket_info",
        r#"{"buckets": {"0": {"resolution": [448, 576], "count": 40}, "1": {"resolution": [512, 512], "count": 160}},
            "mean_img_ar_error": 0.01}"#,
    ),
    ("ss_clip_skip", "2"),
    ("ss_dataset_dirs", r#"{"10_ink style": {"n_repeats": 10, "img_count": 20}}"#),
    ("ss_epoch", "10"),
    ("ss_gradient_accumulation_steps", "1"),
    ("ss_learning_rate", "0.0001"),
    ("ss_loss_type", "l2"),
    ("ss_lr_scheduler", "cosine_with_restarts"),
    ("ss_lr_warmup_steps", "100"),
    ("ss_max_train_steps", "1000"),
    ("ss_min_snr_gamma", "5.0"),
    ("ss_mixed_precision", "fp16"),
    ("ss_network_alpha", "16.0"),
    ("ss_network_args", r#"{"algo": "locon", "conv_dim": "8", "conv_alpha": "4", "preset": null}"#),
    ("ss_network_dim", "32"),
    ("ss_network_dropout", "None"),
    ("ss_network_module", "lycoris.kohya"),
    ("ss_new_sd_model_hash", "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"),
    ("ss_noise_offset", "None"),
    ("ss_num_epochs", "10"),
    ("ss_num_reg_images", "0"),
    ("ss_num_train_images", "200"),
    ("ss_optimizer", "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=[.9,.99])"),
    ("ss_output_name", "inkstyle_v1"),
    ("ss_reg_dataset_dirs", "{}"),
    ("ss_resolution", "(512, 512)"),
    ("ss_sd_model_name", "v1-5-pruned.safetensors"),
    ("ss_sd_scripts_commit_hash", "48d368f0aa11bb22cc33dd44ee55ff6677889900"),
    ("ss_seed", "42"),
    ("ss_session_id", "3027184920"),
    ("ss_steps", "1000"),
    ("ss_tag_frequency", r#"{"10_ink style": {"ink style": 20, " 1girl": 12, "forest": 3, "lake": 3}}"#),
    ("ss_text_encoder_lr", "5e-05"),
    ("ss_total_batch_size", "2"),
    ("ss_training_comment", "None"),
    ("ss_training_finished_at", "1715976900.25"),
    ("ss_training_started_at", "1715972580.75"),
    ("ss_unet_lr", "0.0001"),
    ("ss_v2", "False"),
    ("sshs_legacy_hash", "8e0f2b3c"),
    ("sshs_model_hash", "d2f1c5a7"),
];

#[test]
fn sd_scripts() {
    assert_eq!(
        of(SD_SCRIPTS),
        json!({
            "title": "inkstyle",
            "date": "2024-05-17T20:15:00",
            "tool": {
                "name": "sd-scripts",
                "evidence": "ss_sd_scripts_commit_hash",
                "version": "48d368f0aa11bb22cc33dd44ee55ff6677889900",
            },
            "base": {
                "version": "sd_v1",
                "model": "v1-5-pruned.safetensors",
                "model_hash": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
                "architecture": "stable-diffusion-v1/lora",
                "implementation": "diffusers",
                "prediction_type": "epsilon",
            },
            "trigger": {
                "classes": [{"word": "ink style", "repeats": 10, "images": 20}],
                "tags": [
                    {"tag": "ink style", "count": 20},
                    {"tag": "1girl", "count": 12},
                    {"tag": "forest", "count": 3},
                    {"tag": "lake", "count": 3},
                ],
                "distinct_tags": 4,
            },
            "training": {
                "module": "lycoris.kohya",
                "dim": 32,
                "alpha": 16.0,
                "optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=[.9,.99])",
                "learning_rate": 0.0001,
                "unet_lr": 0.0001,
                "text_encoder_lr": 5e-5,
                "scheduler": "cosine_with_restarts",
                "warmup_steps": 100,
                "steps": 1000,
                "max_steps": 1000,
                "epoch": 10,
                "epochs": 10,
                "images": 200,
                "reg_images": 0,
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "clip_skip": 2,
                "min_snr_gamma": 5.0,
                "mixed_precision": "fp16",
                "seed": 42,
                "loss_type": "l2",
                "args": {"algo": "locon", "conv_dim": 8, "conv_alpha": 4},
                "resolution": "512x512",
                "bucket_count": 2,
                "buckets": [
                    {"resolution": "512x512", "images": 160},
                    {"resolution": "448x576", "images": 40},
                ],
                "seconds": 4320,
            },
            "hashes": {"model": "d2f1c5a7", "legacy": "8e0f2b3c"},
        })
    );
}

#[test]
fn sd_scripts_with_a_dataset_config() {
    let datasets = r#"[{"is_dreambooth": true, "batch_size_per_device": 4, "resolution": [1024, 1024],
        "bucket_info": {"buckets": {"0": {"resolution": [832, 1216], "count": 7}}},
        "subsets": [{"img_count": 14, "num_repeats": 5, "class_tokens": "ohwx man", "is_reg": false, "image_dir": "a"},
                    {"img_count": 90, "num_repeats": 1, "class_tokens": "man", "is_reg": true, "image_dir": "b"},
                    {"img_count": 2, "num_repeats": 1, "class_tokens": null, "is_reg": false, "image_dir": "c"}]},
       {"resolution": [512, 512], "bucket_info": {"buckets": {"0": {"resolution": [832, 1216], "count": 2}}}}]"#;
    let facts = of(&[
        ("ss_datasets", datasets),
        ("ss_text_encoder_lr", "[1e-05, 1e-05]"),
        ("modelspec.implementation_version", "sd-scripts/0123abcd"),
        ("modelspec.trigger_phrase", "ohwx man, photo"),
        ("ss_training_finished_at", "951782400.0"),
    ]);
    let classes = json!([{"word": "ohwx man", "repeats": 5, "images": 14}]);
    assert_eq!(facts["trigger"], json!({"phrases": ["ohwx man, photo"], "classes": classes}));
    assert_eq!(
        facts["training"],
        json!({
            "text_encoder_lr": "[1e-05, 1e-05]",
            "batch_size": 4,
            "resolution": "1024x1024",
            "bucket_count": 1,
            "buckets": [{"resolution": "832x1216", "images": 9}],
        })
    );
    let tool =
        json!({"name": "sd-scripts", "evidence": "modelspec.implementation_version", "version": "0123abcd"});
    assert_eq!(facts["tool"], tool);
    assert_eq!(facts["date"], "2000-02-29", "the day is counted over the leap day of a century");
}

#[test]
fn one_trainer() {
    let config = r#"{"training_method": "LORA", "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
        "peft_type": "LORA", "lora_rank": 16, "lora_alpha": 1.0, "learning_rate": 0.0003, "epochs": 100,
        "learning_rate_scheduler": "CONSTANT", "learning_rate_warmup_steps": 200, "batch_size": 4, "resolution": "1024",
        "gradient_accumulation_steps": 1, "train_dtype": "BFLOAT_16", "loss_weight_fn": "MIN_SNR_GAMMA",
        "loss_weight_strength": 5.0, "offset_noise_weight": 0.0, "dropout_probability": 0.0,
        "optimizer": {"optimizer": "ADAFACTOR", "weight_decay": 0.01}, "unet": {"train": true, "learning_rate": null},
        "text_encoder": {"train": true, "learning_rate": 0.0001}}"#;
    let facts = of(&[
        ("modelspec.sai_model_spec", "1.0.0"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        ("modelspec.implementation", "https://github.com/Stability-AI/generative-models"),
        ("modelspec.title", ""),
        ("modelspec.date", "2024-09-30"),
        ("modelspec.hash_sha256", "0x9a"),
        ("modelspec.license", "CreativeML Open RAIL++-M License"),
        ("ot_branch", "master"),
        ("ot_revision", "15967e6"),
        ("ot_config", config),
        ("ss_base_model_version", "sdxl_"),
    ]);
    assert_eq!(
        facts,
        json!({
            "license": "CreativeML Open RAIL++-M License",
            "date": "2024-09-30",
            "tool": {"name": "OneTrainer", "evidence": "ot_revision", "version": "15967e6"},
            "base": {
                "version": "sdxl_",
                "model": "stabilityai/stable-diffusion-xl-base-1.0",
                "architecture": "stable-diffusion-xl-v1-base/lora",
                "implementation": "https://github.com/Stability-AI/generative-models",
            },
            "training": {
                "module": "LORA", "dim": 16, "alpha": 1.0, "dropout": 0.0, "optimizer": "ADAFACTOR",
                "learning_rate": 0.0003, "text_encoder_lr": 0.0001, "scheduler": "CONSTANT", "warmup_steps": 200,
                "epochs": 100, "batch_size": 4, "gradient_accumulation_steps": 1, "noise_offset": 0.0,
                "mixed_precision": "BFLOAT_16", "min_snr_gamma": 5.0, "resolution": "1024x1024",
            },
            "hashes": {"sha256": "0x9a"},
        })
    );
}

#[test]
fn ai_toolkit() {
    let facts = of(&[
        ("format", "pt"),
        ("name", "lamp_v2"),
        ("version", "1.0"),
        (
            "software",
            r#"{"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.7.1"}"#,
        ),
        ("ss_base_model_version", "flux1"),
        ("ss_output_name", "lamp_v2"),
        ("ss_tag_frequency", r#"{"1_l4mp": {"l4mp": 1}}"#),
        ("sshs_model_hash", "ab"),
        ("training_info", r#"{"step": 2000, "epoch": 133}"#),
    ]);
    assert_eq!(
        facts,
        json!({
            "title": "lamp_v2",
            "tool": {"name": "ai-toolkit", "evidence": "software", "version": "0.7.1"},
            "base": {"version": "flux1"},
            "trigger": {
                "classes": [{"word": "l4mp", "repeats": 1}],
                "tags": [{"tag": "l4mp", "count": 1}],
                "distinct_tags": 1,
            },
            "training": {"steps": 2000, "epoch": 133},
            "hashes": {"model": "ab"},
        })
    );
}

#[test]
fn peft_configurations() {
    let config = r#"{"unet.r": 8, "unet.lora_alpha": 16, "unet.base_model_name_or_path": null, "unet.target_modules":
        ["to_q"], "text_encoder.r": 4, "text_encoder.lora_alpha": 4}"#;
    let facts = of(&[("format", "pt"), ("lora_adapter_metadata", config)]);
    let expected = json!({
        "tool": {"name": "diffusers", "evidence": "lora_adapter_metadata"},
        "training": {"dim": 8, "alpha": 16},
    });
    assert_eq!(facts, expected);
    let facts = of(&[
        ("lora_adapter_metadata", r#"{"transformer.r": 16, "transformer.lora_alpha": 16.0}"#),
        ("modelspec.implementation", "diffusers"),
        ("modelspec.sai_model_spec", "1.0.1"),
        ("modelspec.comment", "trained with flow matching"),
        ("trained_words", "a domokun plush, , domokun,domokun"),
    ]);
    assert_eq!(facts["tool"], json!({"name": "SimpleTuner", "evidence": "trained_words"}));
    assert_eq!(facts["trigger"]["phrases"], json!(["a domokun plush", "domokun"]));
    assert_eq!(facts["comment"], "trained with flow matching");
}

#[test]
fn other_tools_by_what_only_they_write() {
    for (pairs, name, evidence) in [
        (
            &[("ss_num_train_items", "30"), ("ss_base_model_version", "wan")][..],
            "musubi-tuner",
            "ss_num_train_items",
        ),
        (
            &[("ss_network_module", "networks.lora_wan"), ("ss_base_model_version", "wan")],
            "musubi-tuner",
            "ss_base_model_version",
        ),
        (&[("ss_network_module", "networks.lora")], "sd-scripts", "ss_network_module"),
        (&[("ss_network_module", "lycoris.kohya")], "LyCORIS", "ss_network_module"),
        (
            &[("modelspec.implementation_version", "lycore/0.1.0"), ("ss_network_module", "networks.lora")],
            "LyCore",
            "modelspec.implementation_version",
        ),
        (&[("training_info", r#"{"step": 1}"#)], "ai-toolkit", "training_info"),
        (&[("software", "My trainer")], "My trainer", "software"),
    ] {
        let tool = &of(pairs)["tool"];
        assert_eq!((&tool["name"], &tool["evidence"]), (&json!(name), &json!(evidence)));
    }
    assert_eq!(of(&[("format", "pt"), ("training_info", "three days")]), json!({}));
    assert_eq!(of(&[("modelspec.implementation_version", "/")]), json!({}));
    assert_eq!(of(&[("ss_v2", "True")])["base"]["version"], "sd_v2");
}

#[test]
fn words_of_the_additional_networks_extension() {
    let facts = of(&[
        ("ssmd_display_name", "Ink"),
        ("ssmd_keywords", "ink style, brush"),
        ("ss_network_dim", "Dynamic"),
        ("modelspec.thumbnail", "data:image/jpeg;base64,/9j/4AAQSkY="),
    ]);
    assert_eq!(facts["title"], "Ink");
    assert_eq!(facts["trigger"]["phrases"], json!(["ink style", "brush"]));
    assert_eq!(facts["training"]["dim"], "Dynamic", "resized and merged files have no one rank");
    assert_eq!(facts["thumbnail"], json!({"bytes": 8, "type": "image/jpeg"}));
    assert_eq!(of(&[("modelspec.thumbnail", "x")])["thumbnail"], json!({"bytes": 1}));
}

#[test]
fn resolutions_in_every_spelling() {
    for (text, expected) in [
        ("(1024, 1024)", "1024x1024"),
        ("832,1216", "832x1216"),
        ("512", "512x512"),
        ("768x512", "768x512"),
        ("1,2,3", "1,2,3"),
        ("large", "large"),
        ("-1", "-1"),
        ("99999999999", "99999999999"),
    ] {
        assert_eq!(of(&[("ss_resolution", text)])["training"]["resolution"], expected, "{text}");
    }
}

#[test]
fn nothing_said_is_nothing_reported() {
    assert_eq!(of(&[]), json!({}));
    let keys =
        ["ss_output_name", "ss_seed", "ss_datasets", "modelspec.date", "modelspec.thumbnail", "software"];
    for nothing in ["None", "", "  ", "null"] {
        let pairs: Vec<_> = keys.iter().map(|key| (*key, nothing)).collect();
        assert_eq!(of(&pairs), json!({}), "{nothing:?}");
    }
}

#[test]
fn broken_json_is_named_and_spoils_nothing_else() {
    let facts = of(&[
        ("ss_tag_frequency", "{\"a\": {\"b\": 1}"),
        ("ss_dataset_dirs", "[1]"),
        ("ss_network_args", "{\"algo\": NaN}"),
        ("ss_seed", "7"),
    ]);
    assert_eq!(facts["training"], json!({"seed": 7}));
    let unreadable: Vec<_> =
        facts["unreadable"].as_array().unwrap().iter().map(|u| (&u["key"], &u["reason"])).collect();
    assert_eq!(unreadable.len(), 3);
    assert_eq!(unreadable[0].0, "ss_tag_frequency");
    assert!(unreadable[0].1.as_str().unwrap().starts_with("is not JSON: EOF"), "{unreadable:?}");
    assert_eq!(
        unreadable[1],
        (&json!("ss_dataset_dirs"), &json!("is JSON of another kind than is usual there"))
    );
    assert_eq!(unreadable[2].0, "ss_network_args");
}

#[test]
fn nonsense_is_harmless() {
    let facts = of(&[
        (
            "ss_tag_frequency",
            r#"{"a": {"x": -1, "y": 1.5, "z": "3", "": 9, "w": 18446744073709551615, "v": null}, "b": 3,
            "99999999999_c": {"w": 5}, "5_": {}, "_d": {}}"#,
        ),
        (
            "ss_datasets",
            r#"[1, {"subsets": 3, "resolution": [1], "bucket_info": {"buckets": {"0": {"resolution": [-1, 2],
            "count": 1}, "1": 5}}}, {"subsets": [null, {"class_tokens": 5}]}]"#,
        ),
        ("ss_bucket_info", r#"{"buckets": [1]}"#),
        ("ss_training_started_at", "1e308"),
        ("ss_training_finished_at", "-1e308"),
        ("ss_learning_rate", "inf"),
        ("ss_seed", "18446744073709551615"),
        ("ss_steps", "1e999"),
        ("lora_adapter_metadata", r#"{"unet.r": [8], "r": {}}"#),
        ("ot_config", r#"{"optimizer": "ADAMW", "resolution": [1, 2], "unet": 3}"#),
        ("modelspec.implementation_version", "/"),
    ]);
    assert_eq!(
        facts,
        json!({
            "tool": {"name": "OneTrainer", "evidence": "ot_config"},
            "trigger": {"tags": [{"tag": "w", "count": u64::MAX}], "distinct_tags": 1},
            "training": {
                "learning_rate": "inf", "steps": "1e999", "seed": u64::MAX, "resolution": "1x2",
            },
        })
    );
}

#[test]
fn hostile_sizes_are_bounded() {
    let long = "é".repeat(1 << 20);
    let deep = "[".repeat(1 << 20);
    let many: Vec<String> = (0..10_000).map(|i| format!("\"{i}_{i}\": {{\"tag {i}\": {i}}}")).collect();
    let many = format!("{{{}}}", many.join(","));
    let buckets: Vec<String> =
        (1..500).map(|i| format!("\"{i}\": {{\"resolution\": [{i}, 8], \"count\": {i}}}")).collect();
    let buckets = format!("{{\"buckets\": {{{}}}}}", buckets.join(","));
    let args = format!(
        "{{{}}}",
        (0..1000).map(|i| format!("\"a{i}\": \"{long}\"")).take(2).collect::<Vec<_>>().join(",")
    );
    let huge = " ".repeat(5 << 20) + "1";
    let huge = format!("[{huge}]");
    let words = "a, b, ".repeat(1 << 20) + &(0..100).map(|i| i.to_string()).collect::<Vec<_>>().join(",");
    let facts = of(&[
        ("modelspec.title", &long),
        ("ss_dataset_dirs", &deep),
        ("ss_tag_frequency", &many),
        ("ss_bucket_info", &buckets),
        ("ss_network_args", &args),
        ("ss_datasets", &huge),
        ("trained_words", &words),
        ("ss_resolution", &"1,".repeat(1 << 20)),
    ]);
    assert_eq!(facts["title"].as_str().map(str::len), Some(4096 + "…".len()));
    let lengths = ["tags", "classes", "phrases"].map(|name| facts["trigger"][name].as_array().unwrap().len());
    assert_eq!(lengths, [24; 3]);
    assert_eq!(facts["trigger"]["tags"][0], json!({"tag": "tag 9999", "count": 9999}));
    assert_eq!(facts["trigger"]["distinct_tags"], 9999, "a tag that never occurs is none");
    assert_eq!(facts["training"]["bucket_count"], 499);
    assert_eq!(facts["training"]["buckets"].as_array().unwrap().len(), 24);
    let keys: Vec<_> =
        facts["unreadable"].as_array().unwrap().iter().map(|u| u["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["ss_dataset_dirs", "ss_network_args"]);
    assert!(facts.to_string().len() < 100_000, "{}", facts.to_string().len());
}
