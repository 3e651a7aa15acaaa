//! Every family's own list of names (tests/golden/names), there and back.

use super::*;

struct Model {
    family: &'static str,
    checkpoint: Weights,
    diffusers: Weights,
}

macro_rules! models {
    ($($family:literal $file:literal),* $(,)?) => {
        vec![$(Model::read($family, include_str!(concat!("../../../../tests/golden/names/", $file, ".json")))),*]
    };
}

fn models() -> Vec<Model> {
    models![
        "SD 1.x" "sd1", "SD 2.x" "sd2", "SDXL" "sdxl", "SD 3" "sd3", "SD 3" "sd35_large", "SD 3" "sd35_medium",
        "Flux.1" "flux1", "Chroma" "chroma", "Flux.2" "flux2", "Flux.2" "flux2_klein", "Qwen-Image" "qwen_image",
        "Z-Image" "z_image", "Lumina 2" "lumina2", "Wan" "wan", "HunyuanVideo" "hunyuan_video",
        "HunyuanVideo 1.5" "hunyuan_video_15", "HunyuanImage 2.1" "hunyuan_image", "LTX-Video" "ltx_video",
        "LTX-2" "ltx2", "Anima" "anima",
    ]
}

impl Model {
    /// The layers of the list, each size divided by 64 where it can be: shares of rows stay shares.
    fn read(family: &'static str, text: &str) -> Model {
        let json: Value = serde_json::from_str(text).unwrap();
        let small = |n: &Value| n.as_u64().map(|n| if n % 64 == 0 { n / 64 } else { n } as usize).unwrap();
        let list = |layout: &str| -> Weights {
            let lines = json[layout].as_array().unwrap().iter();
            let named = lines.map(|l| (l[0].as_str().unwrap(), l[1].as_array().unwrap()));
            named
                .filter_map(|(n, s)| {
                    Some((n.strip_suffix(".weight")?.to_owned(), s.iter().map(small).collect()))
                })
                // SD 3's last block in the lists is not the last one of a published model, where its context is special.
                .filter(|(n, s): &(String, Vec<usize>)| {
                    s.len() > 1
                        && !(family == "SD 3"
                            && n.contains("blocks.2.")
                            && (n.contains("context") || n.contains("add_")))
                })
                .collect()
        };
        Model { family, checkpoint: list("checkpoint"), diffusers: list("diffusers") }
    }
}

#[test]
fn every_family_goes_there_and_back_bit_for_bit() {
    for model in models() {
        let mut random = Random(7);
        let source = adapter(&loras(&mut random, &model.checkpoint, "diffusion_model.", &[4.0, 0.5, 2.0]));
        let family = Some(model.family);
        let (_a, kohya, _) = converted(&source, &options(Spelling::Kohya, family));
        let (_b, diffusers, report) = converted(&kohya, &options(Spelling::Diffusers, family));
        let (_c, peft, _) = converted(&diffusers, &options(Spelling::Peft, family));
        let (_d, back, _) = converted(&peft, &options(Spelling::Comfyui, family));
        assert_eq!(content(&back), content(&source), "{}", model.family);
        let names: BTreeSet<String> = diffusers.modules().iter().map(|m| m.name.clone()).collect();
        let head = if model.family.starts_with("SD ") && model.family != "SD 3" || model.family == "SDXL" {
            "unet."
        } else {
            "transformer."
        };
        let expected: BTreeSet<String> = model.diffusers.iter().map(|(n, _)| format!("{head}{n}")).collect();
        assert_eq!(names, expected, "{}", model.family);
        assert_eq!(report["family"]["name"], model.family);
        let flat: BTreeSet<String> = kohya.modules().iter().map(|m| m.name.clone()).collect();
        let side =
            if matches!(model.family, "SD 1.x" | "SD 2.x") { &model.diffusers } else { &model.checkpoint };
        let expected = side.iter().map(|(n, _)| format!("lora_unet_{}", n.replace('.', "_"))).collect();
        assert_eq!(flat, expected, "{}", model.family);
    }
}

#[test]
fn every_familys_fused_weights_change_the_same() {
    for model in models() {
        let mut random = Random(11);
        let source = adapter(&loras(&mut random, &model.diffusers, "transformer.", &[4.0]));
        let family = Some(model.family);
        let (_a, comfyui, report) = converted(&source, &options(Spelling::Comfyui, family));
        let fused = report["summary"]["fused"].as_u64().unwrap();
        assert_eq!(fused > 0, model.checkpoint.len() < model.diffusers.len(), "{}", model.family);
        let host: Weights = model
            .checkpoint
            .iter()
            .map(|(n, s)| (format!("diffusion_model.{n}.weight"), s.clone()))
            .collect();
        close(&applied(&comfyui, &host), &applied(&source, &host), model.family);
        let (_b, back, _) = converted(&comfyui, &options(Spelling::Diffusers, family));
        let host: Weights =
            model.diffusers.iter().map(|(n, s)| (format!("transformer.{n}.weight"), s.clone())).collect();
        close(&applied(&back, &host), &applied(&source, &host), model.family);
    }
}
